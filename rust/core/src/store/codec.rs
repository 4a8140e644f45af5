//! How a frame becomes bytes: the pixels that differ from a reference, packed with LZ4. Pure functions on slices.
//!
//! A picture is coded as a stream of runs: the number of pixels in all runs, then for each run how many pixels to skip
//! and how many follow, then the pixels of all runs, first their red, then their green, then their blue. Skipped pixels
//! are those of the reference: of a frame its key frame, of a key frame the row above (black above the first). The
//! stream is one LZ4 block. A picture that this makes no smaller than half stays as it is, and its length says so.

/// Equal pixels between two runs that cost less inside a run than a run of their own.
const GAP: usize = 4;

/// Buffers that coding uses again.
#[derive(Default)]
pub(super) struct Buffers {
    stream: Vec<u8>,
    packed: Vec<u8>,
}

/// A picture that fits most frames of a chunk: each byte is the median of theirs.
pub(super) fn key(frames: &[u8], size: usize) -> Vec<u8> {
    let first = &frames[..size];
    let mut varies = vec![0; size];
    for frame in frames.chunks_exact(size) {
        for (varies, (byte, first)) in varies.iter_mut().zip(frame.iter().zip(first)) {
            *varies |= byte ^ first;
        }
    }
    let mut key = first.to_vec();
    // Where nearly everything varies it is noise, which no key frame helps.
    if varies.iter().filter(|&&varies| varies != 0).count() > size / 2 {
        return key;
    }
    let mut bytes = Vec::new();
    for at in (0..size).filter(|&at| varies[at] != 0) {
        bytes.clear();
        bytes.extend(frames[at..].iter().step_by(size));
        let middle = bytes.len() / 2;
        key[at] = *bytes.select_nth_unstable(middle).1;
    }
    key
}

/// Codes `picture` against `key`, or against its own rows of `row` bytes where there is none. The result lives in
/// `buffers`, or is `picture` itself.
pub(super) fn encode<'a>(picture: &'a [u8], key: Option<&[u8]>, row: usize, buffers: &'a mut Buffers) -> &'a [u8] {
    let runs = match key {
        Some(key) => runs(picture.chunks_exact(3).zip(key.chunks_exact(3))),
        None => {
            runs(picture.chunks_exact(3).zip([0; 3].repeat(row / 3).chunks_exact(3).chain(picture.chunks_exact(3))))
        }
    };
    let stream = &mut buffers.stream;
    stream.clear();
    put(stream, runs.iter().map(|(from, to)| to - from).sum());
    let mut last = 0;
    for &(from, to) in &runs {
        put(stream, from - last);
        put(stream, to - from);
        last = to;
    }
    for channel in 0..3 {
        for &(from, to) in &runs {
            stream.extend(picture[3 * from..3 * to].iter().skip(channel).step_by(3));
        }
    }
    if stream.len() > picture.len() {
        return picture;
    }
    buffers.packed.resize(lz4_flex::block::get_maximum_output_size(stream.len()), 0);
    let length = lz4_flex::block::compress_into(stream, &mut buffers.packed).expect("the buffer is the largest size");
    if length > picture.len() / 2 {
        return picture;
    }
    &buffers.packed[..length]
}

/// Decodes a picture that `encode` made smaller, into `out`; `None` where the bytes mean none. `stream` is a buffer.
pub(super) fn decode(bytes: &[u8], key: Option<&[u8]>, row: usize, out: &mut [u8], stream: &mut Vec<u8>) -> Option<()> {
    // No stream is longer than its picture: more is damage, and LZ4 stops there.
    stream.resize(out.len(), 0);
    let length = lz4_flex::block::decompress_into(bytes, stream).ok()?;
    let stream = &stream[..length];
    let mut at = 0;
    let pixels = take(stream, &mut at)?;
    let colours = length.checked_sub(3 * pixels).filter(|&start| start >= at)?;
    let (mut runs, colours) = (&stream[at..colours], &stream[colours..]);
    let (mut red, rest) = colours.split_at(pixels);
    let (mut green, mut blue) = rest.split_at(pixels);
    if let Some(key) = key {
        out.copy_from_slice(key);
    }
    let mut end = 0;
    while !runs.is_empty() {
        let mut at = 0;
        let skip = take(runs, &mut at)?;
        let count = take(runs, &mut at)?;
        runs = &runs[at..];
        let from = end + 3 * skip;
        if key.is_none() {
            repeat_rows(out, end, from.min(out.len()), row);
        }
        end = from + 3 * count;
        let run = out.get_mut(from..end)?;
        if count > red.len() {
            return None;
        }
        let channels = red[..count].iter().zip(&green[..count]).zip(&blue[..count]);
        for (pixel, ((&red, &green), &blue)) in run.chunks_exact_mut(3).zip(channels) {
            pixel.copy_from_slice(&[red, green, blue]);
        }
        (red, green, blue) = (&red[count..], &green[count..], &blue[count..]);
    }
    if key.is_none() {
        repeat_rows(out, end, out.len(), row);
    }
    red.is_empty().then_some(())
}

/// The ranges of pixels that differ, those with few pixels between them joined.
fn runs<'a>(pairs: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, (pixel, reference)) in pairs.enumerate() {
        if pixel != reference {
            match runs.last_mut() {
                Some((_, end)) if at - *end <= GAP => *end = at + 1,
                _ => runs.push((at, at + 1)),
            }
        }
    }
    runs
}

/// Fills bytes `from` to `to` from the row above them.
fn repeat_rows(out: &mut [u8], mut from: usize, to: usize, row: usize) {
    let black = to.min(row);
    if from < black {
        out[from..black].fill(0);
        from = black;
    }
    while from < to {
        let next = to.min(from + row);
        out.copy_within(from - row..next - row, from);
        from = next;
    }
}

/// Writes a number 7 bits at a time, the lowest first, each byte but the last with its high bit set.
fn put(stream: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        stream.push(number as u8 | 0x80);
        number >>= 7;
    }
    stream.push(number as u8);
}

/// Reads such a number of at most 4 bytes, which is more than any frame has pixels.
fn take(stream: &[u8], at: &mut usize) -> Option<usize> {
    let mut number = 0;
    for shift in [0, 7, 14, 21] {
        let byte = *stream.get(*at)?;
        *at += 1;
        number |= usize::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}
