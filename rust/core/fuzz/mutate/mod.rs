//! Files that are nearly right, made from a script of bytes.
#![allow(dead_code)] // a target uses one of them

pub mod model_file;
pub mod store;

/// Reads numbers off a script; behind its end all are 0.
pub struct Script<'a>(pub &'a [u8]);

impl Script<'_> {
    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// A number below `end`, or 0.
    pub fn below(&mut self, end: usize) -> usize {
        let number = usize::from(self.byte()) << 8 | usize::from(self.byte());
        number % end.max(1)
    }

    /// A number at the edge of something, or any.
    pub fn number(&mut self) -> u64 {
        let edges = [0, 1, 2, 0x7f, 0x80, 0xff, 0x1000, 0xffff, 1 << 24, 0x7fff_ffff, 0xffff_ffff, 1 << 40, u64::MAX];
        match self.byte() {
            at @ 0..=12 => edges[usize::from(at)],
            13..=99 => u64::from(self.byte()),
            _ => self.below(1 << 16) as u64,
        }
    }

    /// Changes some bytes.
    pub fn change(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len());
        let length = self.below(40).min(bytes.len() - at);
        match self.byte() % 8 {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << (self.byte() % 8),
            1 if !bytes.is_empty() => bytes[at] = self.byte(),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..at + length)),
            4 => drop(bytes.splice(at..at, [self.byte()].repeat(length))),
            5 => {
                let copy = bytes[at..at + length].to_vec();
                let to = self.below(bytes.len());
                bytes.splice(to..to, copy);
            }
            _ => {
                let number = self.number().to_le_bytes();
                let width = [1, 2, 4, 8][usize::from(self.byte() % 4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
        }
    }
}
