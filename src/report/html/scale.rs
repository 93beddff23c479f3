//! Axes: a value → a position between 0 and 1, ticks a person would choose, and downsampling that keeps extremes.
//!
//! Owns the mathematics of drawing; knows nothing of SVG or of what is drawn.

/// A linear or logarithmic axis. Positions grow from 0 at `low` to 1 at `high`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scale {
    low: f64,
    high: f64,
    log: bool,
}

/// A place on an axis with its label; minor ones may be hidden where there is little room.
#[derive(Debug, Clone, PartialEq)]
pub struct Tick {
    pub position: f64,
    pub label: String,
    pub minor: bool,
}

impl Scale {
    /// A linear axis over `[low, high]`; an empty range is widened so that every position is finite.
    pub fn linear(low: f64, high: f64) -> Self {
        let (low, high) = if low.is_finite() && high.is_finite() { (low.min(high), low.max(high)) } else { (0.0, 1.0) };
        let pad = if high > low { 0.0 } else { low.abs().max(1.0) * 0.5 };
        Self { low: low - pad, high: high + pad, log: false }
    }

    /// A logarithmic axis over the positive finite values of `[low, high]`, never narrower than a factor of 2.
    pub fn log(low: f64, high: f64) -> Self {
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let (mut low, mut high) = match (positive(low), positive(high)) {
            (true, true) => (low.min(high), low.max(high)),
            (true, false) => (low, low),
            (false, true) => (high / 1e3, high),
            (false, false) => (0.1, 10.0),
        };
        if high / low < 2.0 {
            let middle = (low * high).sqrt();
            (low, high) = (middle / std::f64::consts::SQRT_2, middle * std::f64::consts::SQRT_2);
        }
        Self { low, high, log: true }
    }

    /// An axis that holds every drawable value with a margin of 6 %; logarithmic if asked and possible.
    pub fn around(values: impl Iterator<Item = f64>, log: bool) -> Self {
        let mut range = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|v| v.is_finite() && (!log || *v > 0.0)) {
            range = (range.0.min(value), range.1.max(value));
        }
        if log {
            let scale = Self::log(range.0, range.1);
            let margin = (scale.high / scale.low).powf(0.06);
            return Self { low: scale.low / margin, high: scale.high * margin, log };
        }
        let scale = Self::linear(range.0, range.1);
        let margin = (scale.high - scale.low) * 0.06;
        let floor = if scale.low >= 0.0 { 0.0 } else { f64::NEG_INFINITY };
        Self { low: (scale.low - margin).max(floor), high: scale.high + margin, log }
    }

    /// Position of a value, clamped to the axis; `None` for what has no place on it (NaN, or ≤ 0 on a log axis
    /// lies at the bottom, ±∞ at the ends).
    pub fn position(&self, value: f64) -> Option<f64> {
        if value.is_nan() {
            return None;
        }
        if self.log && value <= 0.0 {
            return Some(0.0);
        }
        let fraction = if self.log {
            (value.ln() - self.low.ln()) / (self.high.ln() - self.low.ln())
        } else {
            (value - self.low) / (self.high - self.low)
        };
        Some(fraction.clamp(0.0, 1.0))
    }

    /// About `wanted` ticks at round values.
    pub fn ticks(&self, wanted: usize) -> Vec<Tick> {
        let values = if self.log { self.log_values(wanted) } else { self.linear_values(wanted) };
        let tick = |(value, minor): (f64, bool)| {
            self.position(value).map(|position| Tick { position, label: crate::report::number(value), minor })
        };
        values.into_iter().filter_map(tick).collect()
    }

    /// Ticks of an axis that counts whole things (steps, rows): never a fraction.
    pub fn whole_ticks(&self, wanted: usize) -> Vec<Tick> {
        let mut values = self.linear_values(wanted);
        values.retain(|(value, _)| value.fract() == 0.0);
        let tick = |(value, minor): (f64, bool)| {
            self.position(value).map(|position| Tick { position, label: format!("{value:.0}"), minor })
        };
        values.into_iter().filter_map(tick).collect()
    }

    fn linear_values(&self, wanted: usize) -> Vec<(f64, bool)> {
        let rough = (self.high - self.low) / wanted.max(1) as f64;
        let magnitude = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * magnitude).find(|s| *s >= rough).unwrap_or(rough);
        let (first, last) = ((self.low / step).ceil() as i64, (self.high / step).floor() as i64);
        // Rounded to 12 digits of the step, so that 3 × 0.1 is printed as 0.3.
        let clean = |i: i64| (i as f64 * step / magnitude * 1e3).round() / 1e3 * magnitude;
        (first..=last).map(|i| (clean(i), (i - first) % 2 == 1)).collect()
    }

    fn log_values(&self, wanted: usize) -> Vec<(f64, bool)> {
        let decades = (self.high / self.low).log10();
        let mantissas: &[f64] = match decades {
            d if d < 0.7 => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
            d if d < 1.7 => &[1.0, 2.0, 5.0],
            d if d < 2.5 => &[1.0, 3.0],
            _ => &[1.0],
        };
        let stride = (decades / wanted.max(1) as f64).ceil().max(1.0) as i32;
        let exponents = (self.low.log10().floor() as i32)..=(self.high.log10().ceil() as i32);
        let mut values = Vec::new();
        for exponent in exponents.filter(|e| mantissas.len() > 1 || e.rem_euclid(stride) == 0) {
            for (i, mantissa) in mantissas.iter().enumerate() {
                let value = mantissa * 10f64.powi(exponent);
                if value >= self.low && value <= self.high {
                    values.push((value, i % 2 == 1));
                }
            }
        }
        values
    }
}

/// Columns into which a long series is cut before it is drawn: more than any screen shows, few enough for the
/// size limit of a report.
pub const COLUMNS: usize = 1000;

/// Keeps first, lowest, highest and last finite point of each column (and every run of non-finite ones as a
/// break), in order; a series that is short already is returned unchanged. `points`: ascending x.
pub fn downsample(points: &[(f64, f64)], columns: usize) -> Vec<(f64, f64)> {
    if points.len() <= columns * 2 {
        return points.to_vec();
    }
    let mut kept = Vec::with_capacity(columns * 4);
    for column in 0..columns {
        let range = column * points.len() / columns..(column + 1) * points.len() / columns;
        let chunk = &points[range];
        let mut picks = vec![0, chunk.len() - 1];
        let by_value = |a: &usize, b: &usize| chunk[*a].1.total_cmp(&chunk[*b].1);
        let finite = || (0..chunk.len()).filter(|i| chunk[*i].1.is_finite());
        picks.extend(finite().min_by(by_value));
        picks.extend(finite().max_by(by_value));
        picks.extend((0..chunk.len()).find(|i| !chunk[*i].1.is_finite()));
        picks.sort_unstable();
        picks.dedup();
        kept.extend(picks.into_iter().map(|i| chunk[i]));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_inside_the_axis() {
        let labels = |scale: Scale| scale.ticks(5).into_iter().map(|t| t.label).collect::<Vec<_>>();
        assert_eq!(labels(Scale::linear(0.0, 1.0)), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(labels(Scale::log(0.009, 12.0)), ["0.01", "0.1", "1", "10"]);
        assert!(Scale::log(0.06, 0.062).ticks(4).len() >= 2);
        for scale in [Scale::linear(3.0, 3.0), Scale::log(0.0, 0.0), Scale::log(f64::NAN, 1.0)] {
            assert!(!scale.ticks(5).is_empty(), "{scale:?}");
            assert!(scale.ticks(5).iter().all(|t| (0.0..=1.0).contains(&t.position)));
        }
    }

    #[test]
    fn whole_axes_have_no_fractions() {
        let ticks = Scale::linear(1.0, 3.0).whole_ticks(8);
        assert_eq!(ticks.iter().map(|t| t.label.as_str()).collect::<Vec<_>>(), ["1", "2", "3"]);
    }

    #[test]
    fn positions_survive_nan_infinity_and_zero() {
        let scale = Scale::around([0.1, f64::NAN, 10.0, f64::INFINITY].into_iter(), true);
        assert_eq!(scale.position(f64::NAN), None);
        assert_eq!(scale.position(f64::INFINITY), Some(1.0));
        assert_eq!(scale.position(0.0), Some(0.0));
        assert!((scale.position(1.0).expect("finite") - 0.5).abs() < 1e-12);
    }

    #[test]
    fn downsampling_keeps_a_one_step_spike_and_a_nan() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (i as f64, 1.0)).collect();
        points[31_234].1 = 99.0;
        points[40_001].1 = f64::NAN;
        points[12].1 = 0.01;
        let kept = downsample(&points, COLUMNS);
        assert!(kept.len() <= COLUMNS * 5, "{}", kept.len());
        assert!(kept.contains(&(31_234.0, 99.0)) && kept.contains(&(12.0, 0.01)));
        assert!(kept.iter().any(|p| p.1.is_nan()));
        assert!(kept.windows(2).all(|w| w[0].0 < w[1].0));
    }
}
