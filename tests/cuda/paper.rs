//! kernels/PERFORMANCE.md follows from formulas: the rows of its tables are computed here, and the file must have them.

use super::benchmark::{FULL, TALLY, costs};

/// A card's peaks as its maker gives them: bytes/s, f32 flop/s, bf16 flop/s of dense products with f32 accumulation.
struct Card {
    bandwidth: f64,
    f32: f64,
    products: f64,
}
/// NVIDIA Ada GPU Architecture (white paper 2.01), appendix A.
const ADA: Card = Card { bandwidth: 1008e9, f32: 82.6e12, products: 165.2e12 };
/// NVIDIA H100 SXM5: NVIDIA H100 Tensor Core GPU Architecture (white paper) and data sheet.
const HOPPER: Card = Card { bandwidth: 3350e9, f32: 66.9e12, products: 989.4e12 };

impl Card {
    /// Milliseconds: the longer of memory, and arithmetic at a quarter of the f32 peak (no fused multiply-adds, dependent
    /// chains, integer work between).
    fn ms(&self, bytes: f64, flops: f64) -> f64 {
        1e3 * (bytes / self.bandwidth).max(flops / (self.f32 / 4.0))
    }
}

/// What a layer's measuring costs.
struct Layer {
    /// All of a layer, forward and backward, unmeasured.
    whole: f64,
    attention: f64,
    /// Every site measured: what the measuring kernels take longer, and the passes over what others make.
    measured: f64,
    /// Every site measured in a pass of its own, as a comparison.
    separate: f64,
}

impl Layer {
    fn of(card: &Card) -> Self {
        let (h, w) = ((FULL.n * FULL.hidden) as f64, (FULL.n * FULL.wide) as f64);
        let attention: f64 =
            costs(&FULL).iter().filter(|c| c.0.starts_with("attention")).map(|&(_, b, f)| card.ms(b, f)).sum();
        // (how often, bytes, flops, elements that are sites) of every kernel of ours that makes a tensor of n rows.
        let kernels = [
            (2.0, 4.0 * h, 4.0 * h, h),         // input and post-attention norm
            (2.0, 4.0 * h, 4.0 * h, 0.0),       // and again in the backward pass
            (2.0, 6.0 * h, 8.0 * h, 0.0),       // their gradients
            (4.0, 4.0 * h, 3.0 * h, h),         // rope of q and k, forward and back
            (4.0, 6.0 * h, h, h),               // residual sums, forward and back
            (1.0, 6.0 * w, 20.0 * w, w),        // gate
            (1.0, 6.0 * w, 20.0 * w, 0.0),      // and again in the backward pass
            (1.0, 10.0 * w, 40.0 * w, 2.0 * w), // its gradients
            (5.0, 6.0 * h, 2.0 * h, h),         // branches added: q, k, v, o, down
            (2.0, 6.0 * w, 2.0 * w, w),         // gate, up
            (7.0, 4.0 * h, h, 0.0),             // gradients scaled for the branches (two of them wider, see below)
            (2.0, 4.0 * (w - h), w - h, 0.0),
            (2.0, 6.0 * h, 2.0 * h, 0.0), // input gradients summed: first of v, k, q and of up, gate
            (1.0, 8.0 * h, 2.0 * h, 0.0), // k
            (2.0, 8.0 * h, 2.0 * h, h),   // last: q, gate
            (1.0, 6.0 * h, 2.0 * h, h),   // o's input
            (1.0, 6.0 * w, 2.0 * w, w),   // down's input
        ];
        let time = |tally: f64| -> f64 {
            kernels.iter().map(|&(times, b, f, sites)| times * card.ms(b, f + tally * sites)).sum()
        };
        // Attention's output and the gradients of q, k and v are measured in passes of their own.
        let own_passes = 4.0 * card.ms(2.0 * h, TALLY * h);
        let sites: f64 = 4.0 * h + kernels.iter().map(|k| k.0 * k.3).sum::<f64>();
        let products = 4.0 * (4.0 * (FULL.hidden * FULL.hidden) as f64 + 3.0 * (FULL.hidden * FULL.wide) as f64);
        let products = 1e3 * products * FULL.n as f64 / card.products;
        Self {
            whole: products + attention + time(0.0),
            attention,
            measured: time(TALLY) - time(0.0) + own_passes,
            separate: card.ms(2.0 * sites, TALLY * sites),
        }
    }
}

#[track_caller]
fn has(line: &str) {
    let file = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/PERFORMANCE.md")).expect("file");
    assert!(file.contains(line), "kernels/PERFORMANCE.md lacks\n{line}");
}

#[test]
fn the_paper_table_follows_from_the_formulas() {
    for (name, bytes, flops) in costs(&FULL) {
        let (ada, hopper) = (ADA.ms(bytes, flops), HOPPER.ms(bytes, flops));
        has(&format!("| {name} | {:.0} MB | {:.2} G | {ada:.2} | {hopper:.2} |", bytes / 1e6, flops / 1e9));
    }
}

#[test]
fn the_share_of_measuring_follows_from_the_formulas() {
    let layers = [Layer::of(&ADA), Layer::of(&HOPPER)];
    let row =
        |what: &str, of: &dyn Fn(&Layer) -> String| format!("| {what} | {} | {} |", of(&layers[0]), of(&layers[1]));
    let share = |ms: f64, l: &Layer| format!("{ms:.2} ms, {:.2} %", 100.0 * ms / l.whole);
    has(&row("a layer, nothing measured", &|l| format!("{:.0} ms", l.whole)));
    has(&row("of which attention", &|l| format!("{:.0} ms", l.attention)));
    has(&row("every site, as it is done", &|l| share(l.measured, l)));
    has(&row("every site, were each read again", &|l| share(l.separate, l)));
    has(&row("every site, if attention took no time", &|l| {
        format!("{:.2} %", 100.0 * l.measured / (l.whole - l.attention))
    }));
    for layer in layers {
        assert!(layer.measured / layer.whole <= 0.01, "the goal is 1 %: {} of {}", layer.measured, layer.whole);
    }
}
