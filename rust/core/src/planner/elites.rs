//! The lowest costs, and the distribution that is fitted to their candidates.

use super::real::Real;

/// A number whose order as an integer is that of the costs (both zeros alike).
fn rank(cost: f64) -> u64 {
    let bits = (cost + 0.0).to_bits();
    if bits >> 63 == 1 {
        !bits
    } else {
        bits | 1 << 63
    }
}

/// Writes to `lowest` which `count` costs are the lowest, ties by index, in ascending order of the index. Costs of +inf are
/// left out, so it may be fewer. `ranks` is scratch.
pub(super) fn select(costs: &[f64], count: usize, ranks: &mut Vec<u64>, lowest: &mut Vec<usize>) {
    lowest.clear();
    ranks.clear();
    ranks.extend(costs.iter().map(|&cost| rank(cost)));
    let (below, &mut last, _) = ranks.select_nth_unstable(count - 1);
    let mut ties = count - below.iter().filter(|&&rank| rank < last).count();
    for (i, &cost) in costs.iter().enumerate() {
        let rank = rank(cost);
        if rank <= last && cost < f64::INFINITY && (rank < last || ties > 0) {
            ties -= usize::from(rank == last);
            lowest.push(i);
        }
    }
}

/// The weighted mean of rows (., width) and the square root of the weighted sum of squared deviations over `degrees`.
#[inline(always)]
pub(super) fn moments<T: Real>(
    rows: &[T],
    which: &[usize],
    weights: &[f64],
    degrees: f64,
    mean: &mut [f64],
    std: &mut [f64],
) {
    let width = mean.len();
    let total: f64 = weights.iter().sum();
    mean.fill(0.0);
    for (&i, &weight) in which.iter().zip(weights) {
        for (mean, &x) in mean.iter_mut().zip(&rows[i * width..][..width]) {
            *mean += weight * x.into();
        }
    }
    for mean in mean.iter_mut() {
        *mean /= total;
    }
    std.fill(0.0);
    for (&i, &weight) in which.iter().zip(weights) {
        for ((std, &mean), &x) in std.iter_mut().zip(&*mean).zip(&rows[i * width..][..width]) {
            let shift = x.into() - mean;
            *std += weight * (shift * shift);
        }
    }
    for std in std.iter_mut() {
        *std = (*std / degrees).sqrt();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_lowest_are_those_of_a_stable_sort(
            costs in prop::collection::vec(prop_oneof![
                -2.0..2.0_f64, Just(0.0), Just(-0.0), Just(f64::INFINITY), Just(f64::MAX), (-3..3_i32).prop_map(f64::from)
            ], 1..60),
            share in 0.0..1.0_f64,
        ) {
            #[allow(clippy::cast_sign_loss)]
            let count = 1 + (share * (costs.len() - 1) as f64) as usize;
            let mut order: Vec<usize> = (0..costs.len()).filter(|&i| costs[i] < f64::INFINITY).collect();
            order.sort_by(|&a, &b| costs[a].partial_cmp(&costs[b]).unwrap());
            order.truncate(count);
            order.sort_unstable();
            let (mut ranks, mut lowest) = (Vec::new(), Vec::new());
            select(&costs, count, &mut ranks, &mut lowest);
            prop_assert_eq!(lowest, order);
        }
    }

    #[test]
    fn moments_of_weighted_rows() {
        let rows = [1.0, 10.0, 99.0, 99.0, 3.0, 20.0, 5.0, 0.0_f64];
        let (mut mean, mut std) = ([0.0; 2], [0.0; 2]);
        moments(&rows, &[0, 2, 3], &[1.0, 1.0, 2.0], 4.0, &mut mean, &mut std);
        assert!((mean[0] - 3.5).abs() < 1e-15 && (mean[1] - 7.5).abs() < 1e-15);
        let var = [(6.25 + 0.25 + 2.0 * 2.25) / 4.0, (6.25 + 156.25 + 2.0 * 56.25) / 4.0_f64];
        assert!((std[0] - var[0].sqrt()).abs() < 1e-15 && (std[1] - var[1].sqrt()).abs() < 1e-14);
    }
}
