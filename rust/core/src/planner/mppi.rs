//! What MPPI (Williams et al. 2017; the update of TD-MPC2, Hansen et al. 2024) does with its elites.

/// Writes the elites' weights: `exp(-(cost - lowest) / (temperature * gap))`.
///
/// The gap is that of the mean elite cost to the lowest, so weights do not change when costs are scaled or shifted, and
/// elites that all cost the same weigh the same.
pub(super) fn weigh(temperature: f64, costs: impl Iterator<Item = f64> + Clone, weights: &mut [f64]) {
    let lowest = costs.clone().fold(f64::INFINITY, f64::min);
    for (weight, cost) in weights.iter_mut().zip(costs) {
        *weight = cost - lowest;
    }
    let gap = weights.iter().sum::<f64>() / weights.len() as f64;
    for weight in weights {
        *weight = if gap > 0.0 { (-*weight / (temperature * gap)).exp() } else { 1.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(temperature: f64, costs: &[f64]) -> Vec<f64> {
        let mut weights = vec![0.0; costs.len()];
        weigh(temperature, costs.iter().copied(), &mut weights);
        weights
    }

    #[test]
    fn weights_follow_the_formula_whatever_the_scale() {
        let costs = [4.0, 1.0, 2.0, 3.0];
        let want = costs.map(|cost| (-(cost - 1.0) / (0.5 * 1.5_f64)).exp());
        for (scale, shift) in [(1.0, 0.0), (1e-9, 0.0), (1e12, -5e12), (2.0, 7.0)] {
            let got = weights(0.5, &costs.map(|cost| scale * cost + shift));
            assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-6), "{got:?} {want:?}");
        }
    }

    #[test]
    fn equal_costs_weigh_the_same() {
        assert_eq!(weights(0.5, &[3.0; 4]), [1.0; 4]);
        assert_eq!(weights(1e-300, &[3.0, 3.5]), [1.0, 0.0]);
        assert!(weights(0.5, &[0.0, f64::MAX, f64::MAX]).iter().all(|w| w.is_finite()));
    }
}
