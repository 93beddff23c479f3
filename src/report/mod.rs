//! What people and programs read: terminal text, one self-contained HTML file, versioned JSON.
//!
//! Owns presentation only. Every number shown was computed by an earlier stage; a page is a pure function of
//! plain strings and numbers, so that it can be tested and looked at without running anything.

pub mod html;
pub mod json;
pub mod page;
pub mod terminal;

/// A number for people: four significant digits, powers of ten outside 0.001–100 000, no trailing zeros.
pub fn number(value: f64) -> String {
    if value.is_nan() {
        return "NaN".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "∞".into() } else { "−∞".into() };
    }
    let size = value.abs();
    if size == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e5).contains(&size) {
        let text = format!("{value:.3e}");
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", trim_zeros(mantissa));
    }
    let decimals = (3 - size.log10().floor() as i32).max(0) as usize;
    trim_zeros(&format!("{value:.decimals$}")).to_owned()
}

/// A share of one as a percentage for people; anything that is not a number is said to be one.
pub fn percent(share: f64) -> String {
    match share {
        s if !s.is_finite() => number(s),
        s if s != 0.0 && s.abs() < 0.01 => format!("{} %", number(s * 100.0)),
        s => format!("{:.0} %", s * 100.0),
    }
}

fn trim_zeros(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_honest() {
        let shown = |v: f64| number(v);
        assert_eq!(shown(0.062_755_338), "0.06276");
        assert_eq!(shown(7.669_123), "7.669");
        assert_eq!(shown(65504.0), "65504");
        assert_eq!(shown(1e-5), "1e-5");
        assert_eq!(shown(123_456_789.0), "1.235e8");
        assert_eq!(shown(-0.5), "-0.5");
        assert_eq!(shown(f64::NAN), "NaN");
        assert_eq!(shown(f64::NEG_INFINITY), "−∞");
        assert_eq!(percent(0.981), "98 %");
        assert_eq!(percent(0.0004), "0.04 %");
        assert_eq!(percent(f64::NAN), "NaN");
    }
}
