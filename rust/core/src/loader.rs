//! In which order training windows are read, and how windows that are in memory already are copied.
//!
//! # Order
//!
//! The windows of the chosen episodes are numbered episode by episode, start by start. Which of them has a place in an epoch
//! is a pure function of (seed, epoch, place): nothing is kept per window, any place can be asked for first, and threads,
//! processes and resumed runs agree. Its randomness is the Philox of [`crate::rng`] under `key = seed`:
//!
//! ```text
//! permutation  counter = (right half, round, epoch, "perm")    word 0: what a Feistel round adds to the left half
//! draws        counter = (place low, place high, epoch, "draw")    words 0, 1: which group; words 2, 3: where in it
//! ```
//!
//! The permutation of n windows is a Feistel network of 8 rounds on pairs of digits in base `max(8, ceil(sqrt n))`, whose
//! domain is hardly larger than n unless n is small, and walks on from a number that is not below n until it meets one that is.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::rng::philox;
use crate::store::threads_allowed;
use crate::Error;

const ROUNDS: u32 = 8;
/// Smaller bases do not reach all permutations alike.
const MIN_SIDE: u64 = 8;
const PERMUTE: u32 = u32::from_be_bytes(*b"perm");
const DRAW: u32 = u32::from_be_bytes(*b"draw");
/// Copied bytes that are worth a thread of their own.
const BYTES_PER_THREAD: usize = 4 << 20;

/// An order of the windows of some episodes, for every epoch. Memory is per episode, or per weight given.
#[derive(Clone, Debug)]
pub struct Order {
    episodes: Vec<i64>,
    /// Windows of all episodes up to and including each.
    ends: Vec<u64>,
    seed: u64,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    InOrder,
    Permuted,
    /// With replacement: running sums of the weights of groups. A group is an episode's windows, or one window.
    Drawn {
        sums: Vec<f64>,
        by_window: bool,
    },
}

impl Order {
    /// Orders the windows of `episodes`, `counts` of each.
    ///
    /// Without `weights` every window has one place in an epoch: its own, or with `shuffle` that of a permutation. With
    /// them windows are drawn with replacement in proportion to their weight: there is one for each episode, given to each
    /// of its windows, or one for each window. Where there are as many of both, they are the episodes'.
    ///
    /// # Errors
    /// [`Error::Argument`] for no window at all, or for weights of another number, negative, not finite, or all zero.
    pub fn new(
        episodes: Vec<i64>,
        counts: &[u64],
        seed: u64,
        shuffle: bool,
        weights: Option<&[f64]>,
    ) -> Result<Self, Error> {
        let wrong = |text: String| Err(Error::Argument(text));
        if episodes.len() != counts.len() {
            return wrong(format!("counts has {} entries for {} episodes", counts.len(), episodes.len()));
        }
        let mut total = 0_u64;
        let ends: Option<Vec<_>> =
            counts.iter().map(|&count| total.checked_add(count).inspect(|&sum| total = sum)).collect();
        let Some(ends) = ends.filter(|_| (1..=1 << 63).contains(&total)) else {
            return wrong(format!("counts wants 1 to 2^63 windows in all, got {total} or more"));
        };
        let kind = match weights {
            None if shuffle => Kind::Permuted,
            None => Kind::InOrder,
            Some(weights) => {
                let by_window = weights.len() != episodes.len();
                if by_window && weights.len() as u64 != total {
                    let (got, episodes) = (weights.len(), episodes.len());
                    return wrong(format!(
                        "weights has {got} entries; wants one for each of {episodes} episodes or of {total} windows"
                    ));
                }
                if let Some(bad) = weights.iter().find(|&&weight| !(weight >= 0.0 && weight.is_finite())) {
                    return wrong(format!("weights has {bad}; wants finite numbers of at least 0"));
                }
                let mut sum = 0.0;
                let sums: Vec<_> = weights
                    .iter()
                    .enumerate()
                    .map(|(i, weight)| {
                        sum += if by_window { *weight } else { weight * counts[i] as f64 };
                        sum
                    })
                    .collect();
                if !(sum > 0.0 && sum.is_finite()) {
                    return wrong(format!("weights of all windows add up to {sum}; wants a finite sum above 0"));
                }
                Kind::Drawn { sums, by_window }
            }
        };
        Ok(Self { episodes, ends, seed, kind })
    }

    /// Number of windows, which is also the number of places in an epoch.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // it never is
    pub fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or_default()
    }

    /// The (episode, start) at a place of an epoch. Places from `len` on exist where windows are drawn.
    ///
    /// # Panics
    /// For a place that does not exist.
    #[must_use]
    pub fn at(&self, epoch: u32, place: u64) -> (i64, i64) {
        let number = match &self.kind {
            Kind::InOrder => place,
            Kind::Permuted => permuted(self.seed, epoch, self.len(), place),
            Kind::Drawn { sums, by_window } => {
                let [w0, w1, w2, w3] = philox([place as u32, (place >> 32) as u32, epoch, DRAW], halves(self.seed));
                let total = sums[sums.len() - 1];
                let unit = ((u64::from(w0 >> 5) << 26) | u64::from(w1 >> 6)) as f64 / (1_u64 << 53) as f64;
                // Below the total even when the product rounds up, so that the group found has a weight.
                let target = (unit * total).min(total.next_down());
                let group = sums.partition_point(|&sum| sum <= target);
                if *by_window {
                    group as u64
                } else {
                    let first = if group == 0 { 0 } else { self.ends[group - 1] };
                    let within =
                        u128::from((u64::from(w2) << 32) | u64::from(w3)) * u128::from(self.ends[group] - first);
                    first + (within >> 64) as u64
                }
            }
        };
        let group = self.ends.partition_point(|&end| end <= number);
        let first = if group == 0 { 0 } else { self.ends[group - 1] };
        (self.episodes[group], i64::try_from(number - first).expect("a start is within an episode"))
    }

    /// Whether an epoch has so many places from `first` on.
    #[must_use]
    pub fn has(&self, first: u64, count: u64) -> bool {
        let end = first.checked_add(count);
        end.is_some_and(|end| end <= self.len() || matches!(self.kind, Kind::Drawn { .. }))
    }
}

fn halves(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// Where a permutation of 0..n takes `x`.
fn permuted(seed: u64, epoch: u32, n: u64, mut x: u64) -> u64 {
    assert!(x < n, "place {x} of {n}");
    let side = ((n - 1).isqrt() + 1).max(MIN_SIDE);
    loop {
        let (mut left, mut right) = (x / side, x % side);
        for round in 0..ROUNDS {
            let [word, ..] = philox([right as u32, round, epoch, PERMUTE], halves(seed));
            let added = left + ((u64::from(word) * side) >> 32);
            (left, right) = (right, if added < side { added } else { added - side });
        }
        x = left * side + right;
        if x < n {
            return x;
        }
    }
}

/// Copies rows of `size` bytes, `items` as pairs (part, row), into `out`, one after the other.
///
/// # Errors
/// [`Error::Index`] for a row that is not there; [`Error::Argument`] for an `out` of another size or a
/// `LEWM_NUM_THREADS` that is no number.
pub fn copy_rows(
    parts: &[&[u8]],
    size: usize,
    items: &[(usize, usize)],
    threads: Option<usize>,
    out: &mut [u8],
) -> Result<(), Error> {
    if size == 0 || items.len().checked_mul(size) != Some(out.len()) {
        let (got, rows) = (out.len(), items.len());
        return Err(Error::Argument(format!("out has {got} bytes; {rows} rows want {size} each")));
    }
    let rows = |part: usize| parts.get(part).map_or(0, |part| part.len() / size);
    if let Some((part, row)) = items.iter().find(|&&(part, row)| row >= rows(part)) {
        return Err(Error::Index(format!("row {row} is not in part {part}, which has {}", rows(*part))));
    }
    let threads = threads.map_or_else(threads_allowed, Ok)?.min(out.len() / BYTES_PER_THREAD).max(1);
    let share = items.len().div_ceil(threads).max(1);
    let shares = Mutex::new(items.chunks(share).zip(out.chunks_mut(share * size)));
    let next = || shares.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some((items, out)) = next() {
            for (&(part, row), out) in items.iter().zip(out.chunks_exact_mut(size)) {
                out.copy_from_slice(&parts[part][row * size..][..size]);
            }
        }
    };
    thread::scope(|scope| {
        // Where the system gives no more threads, fewer do the work.
        let others: Vec<_> =
            (1..threads).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
        work();
        for other in others {
            other.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(counts: &[u64], shuffle: bool, weights: Option<&[f64]>) -> Result<Order, Error> {
        Order::new((10..).take(counts.len()).collect(), counts, 7, shuffle, weights)
    }

    #[test]
    fn unshuffled_windows_come_in_order_and_empty_episodes_have_none() {
        let order = order(&[2, 0, 3, 0], false, None).unwrap();
        let all: Vec<_> = (0..order.len()).map(|place| order.at(9, place)).collect();
        assert_eq!(all, [(10, 0), (10, 1), (12, 0), (12, 1), (12, 2)]);
        assert!(order.has(2, 3) && !order.has(2, 4) && !order.has(u64::MAX, 2));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn every_epoch_is_a_permutation(counts in prop::collection::vec(0_u64..60, 1..40), epoch: u32, seed: u64) {
            prop_assume!(counts.iter().sum::<u64>() > 0);
            let order = Order::new((0..).take(counts.len()).collect(), &counts, seed, true, None).unwrap();
            let mut all: Vec<_> = (0..order.len()).map(|place| order.at(epoch, place)).collect();
            all.sort_unstable();
            let want: Vec<_> = (0..).zip(&counts).flat_map(|(e, &n)| (0..).take(n as usize).map(move |s| (e, s))).collect();
            prop_assert_eq!(all, want);
        }
    }

    /// Every permutation of few, and every (place, window) of some, is as frequent as any other: chi-square within 5 sigma.
    #[test]
    fn permutations_are_uniform() {
        let uniform = |cells: &[u32], tries: u32| {
            let want = f64::from(tries) / cells.len() as f64;
            let chi: f64 = cells.iter().map(|&n| (f64::from(n) - want).powi(2) / want).sum();
            let freedom = (cells.len() - 1) as f64;
            assert!((chi - freedom).abs() < 5.0 * (2.0 * freedom).sqrt(), "{} cells: {chi}", cells.len());
        };
        for n in [2_u64, 3, 4, 5] {
            let mut cells = vec![0; (1..=n).product::<u64>() as usize];
            for epoch in 0..10_000 {
                let mut left: Vec<_> = (0..n).collect();
                let number = (0..n).fold(0, |number, place| {
                    let value = permuted(1, epoch, n, place);
                    let rank = left.iter().position(|&other| other == value).unwrap();
                    left.remove(rank);
                    number * (n - place) as usize + rank
                });
                cells[number] += 1;
            }
            uniform(&cells, 10_000);
        }
        for n in [17_u64, 100] {
            let mut cells = vec![0; (n * n) as usize];
            let mut next = vec![0; (n * n) as usize];
            for seed in 0..1000 {
                let all: Vec<_> = (0..n).map(|place| permuted(seed, 3, n, place)).collect();
                (0..n).for_each(|place| cells[(place * n + all[place as usize]) as usize] += 1);
                all.windows(2).for_each(|pair| next[(pair[0] * n + pair[1]) as usize] += 1);
            }
            uniform(&cells, 1000 * n as u32);
            let pairs: Vec<_> = (0..n * n).filter(|i| i / n != i % n).map(|i| next[i as usize]).collect();
            uniform(&pairs, 1000 * (n as u32 - 1));
        }
    }

    #[test]
    fn large_sets_and_the_ends_of_ranges() {
        let n = 1 << 63;
        let order = Order::new(vec![0, 1], &[n - 5, 5], u64::MAX, true, None).unwrap();
        let (episode, start) = order.at(u32::MAX, n - 1);
        assert!(episode <= 1 && start >= 0);
        assert!(Order::new(vec![0, 1], &[n, 1], 0, true, None).is_err());
        assert_eq!(Order::new(vec![3], &[1], 0, true, None).unwrap().at(0, 0), (3, 0));
    }

    #[test]
    fn draws_follow_the_weights() {
        let tries = 60_000;
        for (weights, shares) in [
            // By episode: a window's weight is its episode's.
            (&[1.0, 5.0, 0.5, 0.0][..], [1.0, 1.0, 0.5, 0.5, 0.5, 0.0]),
            (&[0.0, 2.0, 1.0, 0.0, 4.0, 1.0][..], [0.0, 2.0, 1.0, 0.0, 4.0, 1.0]),
        ] {
            let order = order(&[2, 0, 3, 1], true, Some(weights)).unwrap();
            let windows = [(10, 0), (10, 1), (12, 0), (12, 1), (12, 2), (13, 0)];
            let mut seen = [0; 6];
            for place in 0..tries {
                let window = order.at(2, place);
                seen[windows.iter().position(|&other| other == window).unwrap()] += 1;
            }
            let total: f64 = shares.iter().sum();
            for (count, share) in seen.into_iter().zip(shares) {
                let p = share / total;
                let sigma = (tries as f64 * p * (1.0 - p)).sqrt();
                assert!((f64::from(count) - tries as f64 * p).abs() <= 5.0 * sigma, "{count} for {p}");
            }
            assert!(order.has(u64::MAX - 1, 1), "draws never end");
        }
    }

    #[test]
    fn bad_weights() {
        let text = |weights: &[f64]| order(&[2, 0, 3], true, Some(weights)).unwrap_err().to_string();
        assert_eq!(text(&[1.0; 4]), "weights has 4 entries; wants one for each of 3 episodes or of 5 windows");
        assert!(text(&[1.0, f64::NAN, 1.0]).contains("weights has NaN"));
        assert!(text(&[1.0, -1.0, 1.0]).contains("weights has -1"));
        assert!(text(&[0.0, 1.0, 0.0]).contains("add up to 0"), "the only weight is of an episode without windows");
        assert!(text(&[f64::MAX, 0.0, f64::MAX]).contains("add up to inf"));
        assert!(order(&[0, 0], true, None).unwrap_err().to_string().contains("1 to 2^63 windows"));
        assert!(Order::new(vec![1], &[], 0, true, None).is_err());
    }

    #[test]
    fn rows_are_copied_by_any_number_of_threads() {
        let size = 1 << 20;
        let parts: Vec<Vec<u8>> =
            (0..3_u8).map(|i| (0..4 * size).map(|at| (at / size) as u8 * 10 + i).collect()).collect();
        let parts: Vec<&[u8]> = parts.iter().map(|part| &part[..]).collect();
        let items = [(0, 3), (2, 0), (1, 1), (2, 3), (0, 0), (1, 2), (2, 2), (0, 3), (1, 0)];
        for threads in [None, Some(1), Some(2), Some(5)] {
            let mut out = vec![0xFF; items.len() * size];
            copy_rows(&parts, size, &items, threads, &mut out).unwrap();
            for (&(part, row), out) in items.iter().zip(out.chunks(size)) {
                assert!(out.iter().all(|&byte| usize::from(byte) == row * 10 + part));
            }
        }
        assert!(copy_rows(&parts, size, &[], None, &mut []).is_ok());
        let text = |items: &[(usize, usize)], bytes: usize| {
            copy_rows(&parts, size, items, None, &mut vec![0; bytes]).unwrap_err().to_string()
        };
        assert!(text(&[(0, 4)], size).contains("row 4 is not in part 0, which has 4"));
        assert!(text(&[(3, 0)], size).contains("part 3"));
        assert!(text(&[(0, 0)], 3).contains("out has 3 bytes"));
    }
}
