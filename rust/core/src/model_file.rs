//! Files of tensors (safetensors): model files and checkpoints, read from untrusted bytes.
//!
//! A file is copied into memory rather than mapped: one that is cut while it is mapped ends the process. Nothing is
//! allocated before the size of the file is known to be the one that its header declares, and then what the tensors take.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

pub use safetensors::tensor::Dtype;
use safetensors::tensor::Metadata;

use crate::Error;

/// Bytes that a header may have. Parsing multiplies it: lists of empty lists take 25 times their text.
pub const LARGEST_HEADER: u64 = 16 << 20;

/// What a file holds.
#[derive(Debug)]
pub struct ModelFile {
    /// The header's `lewm` entry, where it has one.
    pub lewm: Option<String>,
    /// The tensors, in the order of their data.
    pub tensors: Vec<Tensor>,
}

/// A tensor as it is stored.
#[derive(Debug)]
pub struct Tensor {
    /// Its name, unlike all others of the file.
    pub name: String,
    /// What a number of it is.
    pub dtype: Dtype,
    /// Its axes.
    pub shape: Vec<usize>,
    /// Its numbers in row-major order, little-endian: as many bytes as `dtype` and `shape` say.
    pub data: Vec<u8>,
}

/// Reads the file at `path`.
///
/// # Errors
/// [`Error::Io`]: it cannot be read. [`Error::Argument`]: it is not a safetensors file.
pub fn read(path: &Path) -> Result<ModelFile, Error> {
    let failed = |error: io::Error| match error.kind() {
        ErrorKind::InvalidData | ErrorKind::UnexpectedEof => Error::Argument(error.to_string()),
        _ => Error::Io(path.to_owned(), error),
    };
    let mut file = File::open(path).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    parse(&mut file, length).map_err(failed)
}

/// Reads a file of `length` bytes from `source`.
///
/// # Errors
/// `InvalidData`: it is not a safetensors file; `UnexpectedEof`: it is shorter than `length`; or what `source` says.
pub fn parse(source: &mut impl Read, length: u64) -> io::Result<ModelFile> {
    let invalid = |text: String| io::Error::new(ErrorKind::InvalidData, text);
    let mut size = [0; 8];
    let Some(rest) = length.checked_sub(8) else {
        return Err(invalid(format!("it has {length} bytes")));
    };
    source.read_exact(&mut size)?;
    let size = u64::from_le_bytes(size);
    if size > rest.min(LARGEST_HEADER) {
        return Err(invalid(format!("its header has {size} bytes: want at most {}", rest.min(LARGEST_HEADER))));
    }
    let header = take(source, size)?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|error| invalid(format!("its header: {error}")))?;
    let (declared, held) = (header.data_len(), rest - size);
    if declared as u64 != held {
        return Err(invalid(format!("its header declares {declared} bytes of tensors and {held} follow")));
    }
    let mut infos: Vec<_> = header.tensors().into_iter().collect();
    infos.sort_by_key(|(_, info)| info.data_offsets);
    let mut tensors = Vec::with_capacity(infos.len());
    for (name, info) in infos {
        let data = take(source, (info.data_offsets.1 - info.data_offsets.0) as u64)?;
        tensors.push(Tensor { name, dtype: info.dtype, shape: info.shape.clone(), data });
    }
    let lewm = header.metadata().as_ref().and_then(|entries| entries.get("lewm").cloned());
    Ok(ModelFile { lewm, tensors })
}

/// The next `count` bytes; more than there is memory for are an error, not the end of the process.
fn take(source: &mut impl Read, count: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(usize::try_from(count).unwrap_or(usize::MAX)).map_err(|_| ErrorKind::OutOfMemory)?;
    let found = source.take(count).read_to_end(&mut bytes)? as u64;
    if found < count {
        return Err(io::Error::new(ErrorKind::UnexpectedEof, format!("it ended {} bytes early", count - found)));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::{parse, ErrorKind};

    #[test]
    fn a_file_that_is_cut_while_it_is_read_is_refused() {
        let header = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let file = [&(header.len() as u64).to_le_bytes()[..], header, &[1; 8]].concat();
        let read = |end: usize| parse(&mut &file[..end], file.len() as u64).map(|file| file.tensors[0].data.len());
        assert_eq!(read(file.len()).unwrap(), 8);
        for end in 0..file.len() {
            assert_eq!(read(end).unwrap_err().kind(), ErrorKind::UnexpectedEof, "{end}");
        }
    }
}
