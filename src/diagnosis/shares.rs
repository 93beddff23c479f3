//! How much of the height each factor carries: Shapley values, for the reader; they choose no verdict.

use std::collections::BTreeMap;

use super::Cause;

/// A part of the height below this is noise of the replay; so few factors are above it that 2^n stays small.
pub const LEAST: f64 = 0.1;

/// Shares of the height by cause, summing to 1; empty when nothing moved anything.
///
/// `removed` holds, per cause, the part of the height (0..1) that its change alone removes; `together` what several
/// changes at once remove, where that was replayed. A coalition that was not replayed removes as much as its best
/// member: the causes here mask one another far more often than they add up. Shapley value of cause i:
/// Σ_S |S|! (n−|S|−1)! / n! · (v(S ∪ i) − v(S)) over all S without i (Shapley 1953).
pub fn shapley(removed: &BTreeMap<Cause, f64>, together: &BTreeMap<Vec<Cause>, f64>) -> BTreeMap<String, f64> {
    let players: Vec<Cause> = removed.iter().filter(|(_, v)| **v >= LEAST).map(|(&c, _)| c).take(11).collect();
    let value = |set: usize| -> f64 {
        let members: Vec<Cause> =
            players.iter().enumerate().filter(|(i, _)| set >> i & 1 == 1).map(|(_, &c)| c).collect();
        let best = members.iter().map(|c| removed[c].clamp(0.0, 1.0)).fold(0.0, f64::max);
        together.get(&members).map_or(best, |v| v.clamp(0.0, 1.0))
    };
    let n = players.len();
    let mut weights = vec![0.0; n];
    for (i, weight) in weights.iter_mut().enumerate() {
        for set in (0..1usize << n).filter(|set| set >> i & 1 == 0) {
            let size = set.count_ones() as usize;
            *weight += coalition_weight(n, size) * (value(set | 1 << i) - value(set));
        }
    }
    let total: f64 = weights.iter().sum();
    if total <= 0.0 {
        return BTreeMap::new();
    }
    players.iter().zip(&weights).map(|(c, w)| (c.word().to_string(), w / total)).collect()
}

/// |S|! (n − |S| − 1)! / n!
fn coalition_weight(n: usize, size: usize) -> f64 {
    let factorial = |k: usize| (1..=k).map(|i| i as f64).product::<f64>();
    factorial(size) * factorial(n - size - 1) / factorial(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_causes_share_equally_and_shares_sum_to_one() {
        let removed = BTreeMap::from([(Cause::Schedule, 0.9), (Cause::LearningRate, 0.9), (Cause::Data, 0.02)]);
        let shares = shapley(&removed, &BTreeMap::new());
        assert_eq!(shares.len(), 2);
        assert!((shares["schedule"] - 0.5).abs() < 1e-12 && (shares["learning_rate"] - 0.5).abs() < 1e-12);
    }

    #[test]
    fn additive_causes_get_what_they_remove() {
        let removed = BTreeMap::from([(Cause::Data, 0.6), (Cause::LearningRate, 0.3)]);
        let together = BTreeMap::from([(vec![Cause::Data, Cause::LearningRate], 0.9)]);
        let shares = shapley(&removed, &together);
        assert!((shares["data"] - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn nothing_that_moved_gives_no_shares() {
        assert!(shapley(&BTreeMap::from([(Cause::Data, 0.05)]), &BTreeMap::new()).is_empty());
    }
}
