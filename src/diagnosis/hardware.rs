//! The replay parts from the log at one step: which single bit, flipped, gives the logged numbers?
//!
//! The next checkpoint ranks the elements (a flipped one lies far from its replayed value, all others within a few
//! updates); the state before the step and the value found afterwards rank its bits; the injected flip, replayed,
//! proves one: it must give the logged loss and gradient norm of the step, and the checkpoint's element. A frozen
//! weight or an activation that flipped for one step leaves no trace on disk but a broken step.

use std::ops::RangeInclusive;

use super::departure::{Difference, differences};
use super::height::Point;
use super::investigate::Budget;
use super::laboratory::{Laboratory, Subject};
use super::{Fault, bits};
use crate::Result;
use crate::device::DType;
use crate::error::Kind;
use crate::replay::{BitFlip, FlipTarget, Intervention, Start};
use crate::run::AdapterWeights;

/// Elements and bits that are injected, best first.
const ELEMENTS: usize = 3;
const BITS: usize = 3;
/// An element counts as flipped beyond this many times the difference of the 99.9th percentile of all.
const STANDS_OUT: f64 = 4.0;
/// A flipped moment shows in the update it feeds: sign and exponent of an f32 are tried.
const MOMENT_BITS: RangeInclusive<u32> = 23..=31;
/// |ln| within which an injected flip gives the logged loss and gradient norm.
const SAME_LOSS: f64 = 0.02;
const SAME_NORM: f64 = 0.1;
/// Further steps that a flip has to give where the first alone says little: a weight that only rounds to the same does
/// not.
const AFTER: u64 = 4;

struct Search<'a, 'r> {
    subject: &'a Subject<'r>,
    lab: &'a mut dyn Laboratory,
    near: &'a Start,
    /// First step whose logged values part from the replay.
    step: u64,
    /// So little that only a flip which gives every bit of the log says anything.
    little: bool,
    budget: &'a mut Budget,
}

/// An adapter element and how far the checkpoint's value lies from the replayed one.
#[derive(Debug, Clone, PartialEq)]
struct Element {
    module: usize,
    target: FlipTarget,
    index: usize,
    distance: f64,
}

/// The flipped bit, proved or as far as it can be told. `little`: log and replay part by no more than a rounding may.
///
/// # Errors
/// Only Ctrl-C.
pub fn locate(
    subject: &Subject<'_>,
    lab: &mut dyn Laboratory,
    near: &Start,
    (step, little): (u64, bool),
    budget: &mut Budget,
) -> Result<Fault> {
    let mut search = Search { subject, lab, near, step, little, budget };
    match search.run() {
        Err(error) if error.kind == Kind::Interrupted => Err(error),
        Err(error) => Ok(search.transient(&format!("no checkpoint after it could be compared ({})", error.what))),
        Ok(fault) => Ok(fault),
    }
}

impl Search<'_, '_> {
    fn run(&mut self) -> Result<Fault> {
        let step = self.step;
        let next = self.subject.run.checkpoints.iter().find(|c| c.step >= step);
        let Some(checkpoint) = next else { return Ok(self.transient("no checkpoint after it tells more")) };
        let recorded = checkpoint.adapter()?;
        if recorded.modules.iter().all(|m| m.b.iter().all(|x| !x.is_finite())) {
            return Ok(self.transient("NaN has spread to the whole adapter, so no element can be told from another"));
        }
        let replayed = self.lab.adapter(self.near, checkpoint.step, &[])?;
        let logged = self.logged_together().rev();
        let before = logged.map(|step| Ok((step, self.lab.adapter(self.near, step - 1, &[])?)));
        let before: Vec<(u64, AdapterWeights)> = before.collect::<Result<_>>()?;
        let elements = far_elements(&recorded, &replayed, !self.little);
        for element in &elements {
            for (step, before) in &before {
                if let Some(fault) = self.adapter_bit(element, &recorded, &replayed, *step, before)? {
                    return Ok(fault);
                }
            }
        }
        for element in &elements {
            if let Some(fault) = self.moment_bit(element, &recorded)? {
                return Ok(fault);
            }
        }
        let nearby = elements.first().map_or_else(String::new, |e| {
            format!(", though {} {}[{}] differs most", recorded.modules[e.module].path, word(e.target), e.index)
        });
        Ok(self.transient(&format!("no single bit of the adapter or its moments explains the next checkpoint{nearby}")))
    }

    /// An element flipped just before `step`, when the adapter was `before`.
    fn adapter_bit(
        &mut self,
        element: &Element,
        recorded: &AdapterWeights,
        replayed: &AdapterWeights,
        step: u64,
        before: &AdapterWeights,
    ) -> Result<Option<Fault>> {
        let value = |weights: &AdapterWeights| f64::from(values(weights, element)[element.index]);
        // The element went on training after the flip, about as far as the unflipped one did.
        let drift = value(replayed) - value(before);
        let after = (value(recorded) - drift) as f32;
        let half = self.subject.plan.adapter != DType::F32;
        let ranked = bits::candidates(value(before) as f32, after, half);
        for (bit, _) in ranked.into_iter().take(BITS) {
            let flip = self.flip(recorded, element, element.target, step, bit);
            if self.gives_the_log(&flip)? {
                return Ok(Some(self.fault(&flip, value(before) as f32)));
            }
        }
        Ok(None)
    }

    fn transient(&self, why: &str) -> Fault {
        let steps = self.logged_together();
        let (first, last) = (*steps.start(), *steps.end());
        let place = if first < last { format!("one of the steps {first} to {last}") } else { format!("step {last}") };
        Fault {
            step: self.step,
            target: "transient".into(),
            tensor: None,
            element: None,
            bit: None,
            proved: false,
            message: format!("a transient fault in the forward or backward pass of {place}; {why}"),
        }
    }

    /// The steps whose mean is the log row that parts: any of them may be the flip's.
    fn logged_together(&self) -> RangeInclusive<u64> {
        let row = self.subject.rows.iter().find(|row| row.step == self.step);
        let window = row.map_or(1, |row| row.window.max(1));
        (self.step + 1).saturating_sub(window).max(1)..=self.step
    }

    /// A moment flipped before the update ahead of the departure.
    fn moment_bit(&mut self, element: &Element, recorded: &AdapterWeights) -> Result<Option<Fault>> {
        if self.step < 2 {
            return Ok(None);
        }
        for target in [FlipTarget::ExpAvg, FlipTarget::ExpAvgSq] {
            for bit in MOMENT_BITS.rev() {
                let flip = self.flip(recorded, element, target, self.step - 1, bit);
                if self.gives_the_log(&flip)? {
                    return Ok(Some(self.fault(&flip, f32::NAN)));
                }
            }
        }
        Ok(None)
    }

    fn flip(&self, weights: &AdapterWeights, element: &Element, target: FlipTarget, step: u64, bit: u32) -> BitFlip {
        let module = &weights.modules[element.module];
        let moment = matches!(target, FlipTarget::ExpAvg | FlipTarget::ExpAvgSq);
        // Moments of A come first; those of B count on.
        let index = element.index + if moment && element.target == FlipTarget::LoraB { module.a.len() } else { 0 };
        let bit = if self.subject.plan.adapter == DType::F32 { bit } else { bit.saturating_sub(16) };
        BitFlip { step, target, tensor: module.path.clone(), element: index, bit }
    }

    fn gives_the_log(&mut self, flip: &BitFlip) -> Result<bool> {
        if !self.budget.allows(1) {
            return Ok(false);
        }
        let to = if self.little { (self.step + AFTER).min(self.subject.last_step()) } else { self.step };
        let trace = self.lab.replay(self.near, to, &[Intervention::FlipBit(flip.clone())])?;
        self.budget.used += 1;
        let replayed: Vec<Point> = trace.steps.iter().map(Point::comparable).collect();
        let together = differences(&replayed, &self.subject.points, self.subject.rounding());
        if self.little {
            return Ok(together.iter().all(Difference::is_none));
        }
        let at = together.iter().find(|d| d.step == self.step);
        Ok(at.is_some_and(|d| d.loss <= SAME_LOSS && (d.grad_norm.is_nan() || d.grad_norm <= SAME_NORM)))
    }

    fn fault(&self, flip: &BitFlip, before: f32) -> Fault {
        let target = word(flip.target);
        let values = if before.is_finite() && self.subject.plan.adapter == DType::F32 {
            format!(" ({before:.4e} became {:.4e})", bits::flipped(before, flip.bit))
        } else {
            String::new()
        };
        Fault {
            step: flip.step,
            target: target.into(),
            tensor: Some(flip.tensor.clone()),
            element: Some(flip.element),
            bit: Some(flip.bit),
            proved: true,
            message: format!(
                "bit {} of {} {target}[{}]{values}, before step {}",
                flip.bit, flip.tensor, flip.element, flip.step
            ),
        }
    }
}

fn word(target: FlipTarget) -> &'static str {
    match target {
        FlipTarget::LoraA => "lora_A",
        FlipTarget::LoraB => "lora_B",
        FlipTarget::ExpAvg => "exp_avg",
        FlipTarget::ExpAvgSq => "exp_avg_sq",
        FlipTarget::BaseTransient => "base",
    }
}

fn values<'w>(weights: &'w AdapterWeights, element: &Element) -> &'w [f32] {
    let module = &weights.modules[element.module];
    if element.target == FlipTarget::LoraA { &module.a } else { &module.b }
}

/// Elements whose recorded value lies far outside what all others differ by, farthest first. A value that is not
/// finite is farthest of all. `guess`: the farthest where none stands out.
fn far_elements(recorded: &AdapterWeights, replayed: &AdapterWeights, guess: bool) -> Vec<Element> {
    let mut all: Vec<Element> = Vec::new();
    for (module, ours) in replayed.modules.iter().enumerate() {
        let Some(theirs) = recorded.modules.get(module).filter(|m| m.path == ours.path) else { continue };
        for (target, a, b) in [(FlipTarget::LoraA, &theirs.a, &ours.a), (FlipTarget::LoraB, &theirs.b, &ours.b)] {
            all.extend(a.iter().zip(b).enumerate().map(|(index, (x, y))| {
                let distance = f64::from(x - y).abs();
                let distance = if distance.is_nan() { f64::INFINITY } else { distance };
                Element { module, target, index, distance }
            }));
        }
    }
    all.sort_by(|x, y| y.distance.total_cmp(&x.distance));
    let usual = all.get(all.len() / 1000 + 1).map_or(0.0, |e| e.distance);
    let far = all.iter().take(ELEMENTS).filter(|e| e.distance > STANDS_OUT * usual || usual == 0.0);
    let mut chosen: Vec<Element> = far.cloned().collect();
    // After a moment's flip nothing stands out so clearly; the farthest is still the best guess.
    if chosen.is_empty() && guess {
        chosen.extend(all.into_iter().take(1));
    }
    chosen
}
