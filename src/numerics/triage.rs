//! One step of a run, interrogated: does this device compute it the same way twice, do checksums, a recomputation and
//! another implementation agree, and how far would another order of additions have moved it?
//!
//! The evidence is gathered by [`examine`]; [`Evidence::state`] judges it and nothing else.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::trail::{Location, Mark, Trail, near, parting};
use super::{Checksums, Faults, Mismatch, Recompute, Reorder, SplitK, Violation};
use crate::Result;
use crate::device::Device;
use crate::device::hooked::{Hook, Hooked, Switch};
use crate::error::Kind;
use crate::probe::Probes;
use crate::replay::{
    CrossCheck, Envelope, Observer, Replayer, Source, Start, StepRecord, second_opinion, second_opinion_bytes,
};

/// What is known of a step after it was interrogated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evidence {
    pub step: u64,
    /// Loss and pre-clip gradient norm of each repeat.
    pub repeats: Vec<(f64, f64)>,
    /// Where the odd repeat parts from the others.
    pub parted: Option<Location>,
    /// Repeats all differ from one another.
    pub never_the_same: bool,
    pub products: u64,
    pub violations: Vec<Violation>,
    /// What another device computes otherwise, and which one that was.
    pub mismatch: Option<(Location, Mismatch)>,
    pub compared_with: String,
    /// The step by candle's autograd; written by `present`.
    #[serde(skip)]
    pub second: SecondOpinion,
    /// Loss and gradient norm with the terms of every product in another order.
    pub reordered: Vec<(f64, f64)>,
    /// The same with every product cut in two and in four parts, whose sums are rounded to the result's dtype.
    pub split: Vec<(f64, f64)>,
    /// Loss and gradient norm in the log, as far as they are those of this step alone.
    pub logged: (Option<f64>, Option<f64>),
    /// Relative deviations of loss and gradient norm that mean nothing in this precision.
    pub floor: (f64, f64),
}

/// What an implementation that shares no code with this one says of the step. It computes in f32 and without dropout, and
/// so is compared with this device in f32 without dropout: it can tell that a formula or a kernel is wrong, also where the
/// same wrong code runs on two devices, but not what is wrong with half-precision arithmetic alone.
#[derive(Debug, Clone, PartialEq)]
pub enum SecondOpinion {
    Heard(Box<CrossCheck>),
    /// Why it was not heard, or says nothing.
    Silent(String),
}

impl SecondOpinion {
    /// Both computed finite numbers and they are not the same. Numbers that are not finite say nothing here.
    fn disagrees(&self) -> bool {
        match self {
            Self::Heard(check) => check.losses[0].is_finite() && !check.agrees(),
            Self::Silent(_) => false,
        }
    }
}

/// What a step says about the arithmetic it was computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The same bits every time, and those of another device.
    Correct,
    /// A repeat differed and did not come back.
    Transient,
    /// The same wrong result every time.
    Persistent,
    /// Differs between repeats, or from the log, by what an order of additions changes.
    OrderDependent,
    Undetermined,
}

impl Evidence {
    /// The judgement (issue: transient, persistent, order-dependent told apart by what repeats and what agrees).
    pub fn state(&self) -> State {
        let wrong = self.mismatch.is_some() || !self.violations.is_empty() || self.second.disagrees();
        match (&self.parted, self.never_the_same) {
            // A fault that strikes every repeat at the same place leaves the repeats equal; one that does not, parts them.
            (Some(_), false) => State::Transient,
            (Some(_), true) if wrong => State::Undetermined,
            (Some(_), true) => State::OrderDependent,
            (None, _) if wrong => State::Persistent,
            (None, _) if self.departs() && self.within_orders() => State::OrderDependent,
            (None, _) if self.repeats.len() < 2 => State::Undetermined,
            (None, _) => State::Correct,
        }
    }

    /// Distances of the log from the repeats, each beside what the orders tried here moved that number.
    fn distances(&self) -> Vec<(f64, f64, f64)> {
        let Some(&(loss, norm)) = self.repeats.first() else { return vec![] };
        let moved = |ours: f64, of: fn(&(f64, f64)) -> f64| {
            self.reordered.iter().chain(&self.split).map(|r| (of(r) - ours).abs()).fold(0.0, f64::max)
        };
        let of_loss = self.logged.0.map(|logged| ((loss - logged).abs(), moved(loss, |r| r.0), self.floor.0 * logged));
        let of_norm = self.logged.1.map(|logged| ((norm - logged).abs(), moved(norm, |r| r.1), self.floor.1 * logged));
        of_loss.into_iter().chain(of_norm).collect()
    }

    fn departs(&self) -> bool {
        // NaN departs.
        self.distances().iter().any(|&(distance, _, floor)| distance > floor || distance.is_nan())
    }

    /// Whether the log lies no further from the repeats than twice what the orders tried here moved them.
    fn within_orders(&self) -> bool {
        self.distances().iter().all(|&(distance, moved, floor)| distance <= 2.0 * moved + floor)
    }

    /// Where the fault is, if there is one.
    pub fn location(&self) -> Option<&Location> {
        self.parted.as_ref().or(self.mismatch.as_ref().map(|(location, _)| location))
    }
}

/// How often a step is repeated, and with how many orders of additions.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    pub repeats: usize,
    pub orders: usize,
    /// Whether candle is asked, where its copy of the model fits [`SECOND_BYTES`].
    pub second: bool,
}

/// The most memory that a second opinion may take: the model in f32.
pub const SECOND_BYTES: usize = 4 << 30;

impl Default for Effort {
    fn default() -> Self {
        Self { repeats: 3, orders: 3, second: true }
    }
}

/// A step of a run on a device whose operations can be watched.
pub struct Suspect {
    /// The device without any hook.
    bare: Arc<dyn Device>,
    switch: Arc<Switch>,
    /// Below the watching hook: faults planted into the suspect.
    faults: Arc<Switch>,
    replayer: Replayer,
    names: HashMap<usize, String>,
    step: u64,
    start: Start,
}

/// Sets a hook for one step of a replay and takes it away after it.
struct OneStep<'b> {
    suspect: &'b Suspect,
    hook: Option<Arc<dyn Hook>>,
    fault: Option<Arc<Faults>>,
    /// A replay asks for a step's probes while it looks ahead and again when it runs the step.
    begun: bool,
}

impl Observer for OneStep<'_> {
    fn probes(&mut self, step: u64) -> Probes {
        if step == self.suspect.step {
            if let (Some(fault), false) = (&self.fault, self.begun) {
                fault.begin_step();
            }
            self.begun = true;
            self.suspect.faults.set(self.fault.clone().map(|fault| fault as Arc<dyn Hook>));
            self.suspect.switch.set(self.hook.clone());
        }
        Probes::Off
    }
    fn wants_state(&mut self, step: u64) -> bool {
        step == self.suspect.step
    }
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if record.step == self.suspect.step {
            self.suspect.unhook();
        }
        Ok(())
    }
}

impl Suspect {
    /// Opens the run and replays it up to the step before `step`.
    ///
    /// # Errors
    /// Those of the run and its replay.
    pub fn open(source: Source, device: Arc<dyn Device>, step: u64) -> Result<Self> {
        let (switch, faults) = (Arc::new(Switch::default()), Arc::new(Switch::default()));
        let hooked = |inner, hook: &Arc<Switch>| Arc::new(Hooked { inner, hook: Arc::clone(hook) as Arc<dyn Hook> });
        let bare = Arc::clone(&device);
        let device = hooked(hooked(device, &faults), &switch);
        let replayer = Replayer::open(Source { cache: None, ..source }, device)?;
        // Names the step that was typed, not the one before it, where the run has none.
        replayer.window(step)?;
        let names = replayer.scene().engine.weight_names();
        let start = replayer.start_before(step);
        let first = match start {
            Start::Initial => 1,
            Start::Checkpoint(k) => k + 1,
        };
        if step > first {
            replayer.replay(&start, step - 1, &[], &mut crate::replay::Silent)?;
        }
        Ok(Self { bare, switch, faults, replayer, names, step, start })
    }

    /// The step once, watched by `hook`, with a fault planted if there is one.
    ///
    /// # Errors
    /// Those of the replay.
    pub fn run(&self, hook: Option<Arc<dyn Hook>>, fault: Option<&Arc<Faults>>) -> Result<StepRecord> {
        let mut observer = OneStep { suspect: self, hook, fault: fault.cloned(), begun: false };
        let trace = self.replayer.replay(&self.start, self.step, &[], &mut observer);
        self.unhook();
        let last = trace?.steps.pop();
        last.ok_or_else(|| crate::Error::internal(format!("step {} was not replayed", self.step)))
    }

    fn unhook(&self) {
        self.switch.set(None);
        self.faults.set(None);
    }

    /// The step by candle, and by this device (with a fault that lasts, if there is one).
    fn second(&self, fault: Option<&Arc<Faults>>) -> Result<SecondOpinion> {
        let bytes = second_opinion_bytes(&self.replayer);
        if bytes > SECOND_BYTES {
            let size = bytes as f64 / f64::from(1 << 30);
            return Ok(SecondOpinion::Silent(format!("not asked: the model takes {size:.0} GiB in f32")));
        }
        let heard = second_opinion(&self.replayer, &self.start, self.step, &mut || {
            if let Some(fault) = fault {
                fault.begin_step();
                self.faults.set(Some(Arc::clone(fault) as Arc<dyn Hook>));
            }
        });
        self.unhook();
        match heard {
            Ok(check) => Ok(SecondOpinion::Heard(Box::new(check))),
            Err(error) if error.kind == Kind::Interrupted => Err(error),
            Err(error) => Ok(SecondOpinion::Silent(format!("cannot be asked: {error}"))),
        }
    }

    fn marks(&self, fault: Option<&Arc<Faults>>) -> Result<(Vec<Mark>, (f64, f64))> {
        let trail = Arc::new(Trail::default());
        let record = self.run(Some(Arc::clone(&trail) as Arc<dyn Hook>), fault)?;
        Ok((trail.marks(), (record.loss, record.grad_norm)))
    }
}

/// Interrogates the step on the device of `suspect` (into which `fault` was planted, if there is one).
///
/// # Errors
/// Those of the replay.
pub fn examine(
    suspect: &Suspect,
    trusted: &Arc<dyn Device>,
    effort: Effort,
    fault: Option<&Arc<Faults>>,
) -> Result<Evidence> {
    let device = suspect.replayer.shared_device();
    let shares_memory = device.name() == trusted.name();
    let (mut trails, mut repeats) = (Vec::new(), Vec::new());
    for _ in 0..effort.repeats.max(2) {
        let (marks, numbers) = suspect.marks(fault)?;
        trails.push(marks);
        repeats.push(numbers);
    }
    let (parted, never_the_same) = odd_one(&trails, &suspect.names);
    let checksums = Arc::new(Checksums::on(Arc::clone(&suspect.bare)));
    suspect.run(Some(Arc::clone(&checksums) as Arc<dyn Hook>), fault)?;
    let (products, violations) = checksums.found()?;
    let recompute = Arc::new(Recompute::on(Arc::clone(trusted), shares_memory));
    suspect.run(Some(Arc::clone(&recompute) as Arc<dyn Hook>), fault)?;
    let mismatch = recompute.mismatches().into_iter().next().map(|m| {
        let near = trails.first().and_then(|marks| near(marks, m.call, &suspect.names));
        let location = Location { call: m.call, operation: m.operation, near, result: m.result, row: m.row };
        (location, m)
    });
    let mut reordered = Vec::new();
    for seed in 0..effort.orders as u64 {
        let record = suspect.run(Some(Arc::new(Reorder { seed })), fault)?;
        reordered.push((record.loss, record.grad_norm));
    }
    let mut split = Vec::new();
    for parts in [2, 4].into_iter().take(effort.orders) {
        let record = suspect.run(Some(Arc::new(SplitK { parts })), fault)?;
        split.push((record.loss, record.grad_norm));
    }
    let row = suspect.replayer.run().log.rows.iter().rev().find(|row| row.step == suspect.step);
    let alone = row.filter(|row| row.window == 1).and_then(|row| row.loss);
    let floor = Envelope::floor(suspect.replayer.scene().engine.plan());
    Ok(Evidence {
        step: suspect.step,
        repeats,
        parted,
        never_the_same,
        products,
        violations,
        mismatch,
        compared_with: trusted.name(),
        second: if effort.second { suspect.second(fault)? } else { SecondOpinion::Silent("not asked".into()) },
        reordered,
        split,
        logged: (alone, row.and_then(|row| row.grad_norm)),
        floor: (floor.loss, floor.grad_norm),
    })
}

/// Where a repeat parts from the majority; whether no two repeats agree.
fn odd_one(trails: &[Vec<Mark>], names: &HashMap<usize, String>) -> (Option<Location>, bool) {
    let same = |a: &[Mark], b: &[Mark]| parting(a, b, names).is_none();
    let Some(common) = trails.iter().find(|a| trails.iter().filter(|b| same(a, b)).count() * 2 > trails.len()) else {
        let parted = trails.first().zip(trails.get(1)).and_then(|(a, b)| parting(a, b, names));
        return (parted, true);
    };
    let odd = trails.iter().find(|trail| !same(trail, common));
    (odd.and_then(|odd| parting(common, odd, names)), false)
}
