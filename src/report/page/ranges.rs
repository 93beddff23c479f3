//! Which place in the model came how near to the end of its number format.

use crate::report::html::heat::{Cell, HeatMap};
use crate::report::number;

/// Forward or backward through a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    Forward,
    Backward,
}

/// The extremes one site saw over the replayed steps.
#[derive(Debug, Clone)]
pub struct SiteRange {
    /// Decoder block, or `None` for embedding, final norm, head.
    pub layer: Option<usize>,
    /// `mlp.down_proj input`, the same word in every layer.
    pub kind: String,
    pub pass: Pass,
    /// Largest finite magnitude; of the unscaled value times the loss scale where one was used.
    pub max_abs: f64,
    /// Largest finite value of the format compared with (65504 for fp16).
    pub limit: f64,
    /// Elements beyond the limit.
    pub overflow: u64,
    /// Elements that are not finite only because an earlier site's were not.
    pub inherited: u64,
    /// Share of non-zero elements below the smallest normal number of the format.
    pub underflow_share: f64,
}

impl SiteRange {
    /// Binades between the largest value and the limit; negative or −∞ when the limit was crossed.
    pub fn headroom(&self) -> f64 {
        if self.overflow > 0 && self.max_abs <= self.limit {
            return f64::NEG_INFINITY;
        }
        (self.limit / self.max_abs).log2()
    }
    fn name(&self) -> String {
        match self.layer {
            Some(layer) => format!("layers.{layer}.{}", self.kind),
            None => self.kind.clone(),
        }
    }
}

/// Layers × kinds for one pass, coloured by how little room is left; `None` when nothing was measured.
pub fn map(ranges: &[SiteRange], pass: Pass) -> Option<HeatMap> {
    let of_pass: Vec<&SiteRange> = ranges.iter().filter(|r| r.pass == pass).collect();
    let mut kinds: Vec<&str> = Vec::new();
    let mut layers: Vec<usize> = of_pass.iter().filter_map(|r| r.layer).collect();
    layers.sort_unstable();
    layers.dedup();
    for range in of_pass.iter().filter(|r| r.layer.is_some()) {
        if !kinds.contains(&range.kind.as_str()) {
            kinds.push(&range.kind);
        }
    }
    if layers.is_empty() {
        return None;
    }
    let cell = |kind: &str, layer: usize| {
        of_pass.iter().find(|r| r.layer == Some(layer) && r.kind == kind).map_or_else(Cell::default, |r| site_cell(r))
    };
    Some(HeatMap {
        title: match pass {
            Pass::Forward => "Forward".into(),
            Pass::Backward => "Backward".into(),
        },
        unit: if of_pass.iter().any(|r| r.inherited > 0) {
            "room below the format's largest number; striped: beyond it; dotted: not finite because an earlier place was not"
        } else {
            "room below the format's largest number; striped: beyond it"
        }
        .into(),
        row_name: "site".into(),
        column_name: "layer".into(),
        rows: kinds.iter().map(|k| (*k).to_owned()).collect(),
        columns: layers.iter().map(usize::to_string).collect(),
        cells: kinds.iter().map(|kind| layers.iter().map(|layer| cell(kind, *layer)).collect()).collect(),
        range: Some((0.0, ROOMY)),
        ends: Some((format!("{ROOMY} binades or more"), "none".into())),
        wide_names: true,
        ..HeatMap::default()
    })
}

/// Headroom (binades) from which a site is not worth looking at: the shade of the page.
const ROOMY: f64 = 20.0;

fn site_cell(range: &SiteRange) -> Cell {
    let headroom = range.headroom();
    let crossed = range.overflow > 0 || headroom < 0.0 || headroom.is_nan();
    let inherited = match range.inherited {
        0 => String::new(),
        count => format!("\n{count} elements not finite because an earlier place was not"),
    };
    Cell {
        value: Some(if crossed { f64::INFINITY } else { (ROOMY - headroom).clamp(0.0, ROOMY) }),
        title: format!(
            "{}\nlargest {} of {}: headroom {} binades\n{} elements beyond, underflow {}{inherited}",
            range.name(),
            number(range.max_abs),
            number(range.limit),
            number(headroom),
            range.overflow,
            crate::report::percent(range.underflow_share)
        ),
        bad: crossed,
        inherited: !crossed && range.inherited > 0,
        ..Cell::default()
    }
}

/// The sites with the least room, worst first.
pub fn worst(ranges: &[SiteRange], count: usize) -> Vec<&SiteRange> {
    let mut sorted: Vec<&SiteRange> = ranges.iter().collect();
    sorted.sort_by(|a, b| a.headroom().total_cmp(&b.headroom()));
    sorted.truncate(count);
    sorted
}

/// Name, pass and measures of a site for a table.
pub fn row(range: &SiteRange) -> [String; 6] {
    let pass = match range.pass {
        Pass::Forward => "forward",
        Pass::Backward => "backward",
    };
    [
        range.name(),
        pass.into(),
        number(range.max_abs),
        number(range.headroom()),
        range.overflow.to_string(),
        crate::report::percent(range.underflow_share),
    ]
}
