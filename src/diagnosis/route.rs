//! Where a trial starts, and what it costs: as little of the run as shows the effect of its change.
//!
//! A change acts from a few steps before the spike on, in the state that the unchanged run had reached by then; the
//! steps up to there belong to the baseline. Where the damage was done before, it acts from further back.

use super::Cause;
use super::investigate::Bench;
use super::laboratory::step_of;
use super::plan::{From, Proposal};
use crate::replay::{Start, Trace};

/// Steps before the spike from which a change acts first …
const LEAD: u64 = 8;
/// … and then, if that did not help.
const FURTHER: u64 = 16;
/// The replay keeps a state after every so many steps.
const KEPT: u64 = 4;
/// Unchanged steps that may be replayed to reach the state in which a change begins to act.
const APPROACH: u64 = 64;

/// One way to replay a trial.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Route {
    pub start: Start,
    /// The change acts after this step; `None`: from the start.
    pub after: Option<u64>,
    /// First step that the change can alter.
    pub first: u64,
    /// Begins before the nearest start point, or further back than usual.
    pub back: bool,
}

impl Bench<'_, '_> {
    /// Ways to replay a proposal, in the order in which they are tried.
    pub(super) fn routes(&self, proposal: &Proposal) -> Vec<Route> {
        let whole = |start: Start, first: u64, back: bool| Route { start, after: None, first, back };
        match proposal.from {
            From::Initial => vec![whole(Start::Initial, 1, false)],
            From::Before(step) => {
                let start = self.whole_before(step);
                let first = step.max(step_of(&start)) + 1;
                vec![whole(start, first, false)]
            }
            // Rows and windows: the steps before theirs stay as they are anyway. Rows that have come long before are
            // masked near the spike only, where masking them all along is more than the windows allow.
            From::Near if matches!(proposal.cause, Cause::Data | Cause::MaskedLabels | Cause::TrainerBookkeeping) => {
                let all_along = whole(self.near.clone(), step_of(&self.near) + 1, false);
                let rows = proposal.cause != Cause::TrainerBookkeeping;
                match rows && !self.budget.allows(self.cost(proposal, &all_along)) {
                    true => vec![self.route_from(&self.near, LEAD, false)],
                    false => vec![all_along],
                }
            }
            From::Near => {
                let near = self.route_from(&self.near, LEAD, false);
                let earlier = self.starts.iter().find(|s| step_of(s) <= self.lead(FURTHER));
                let further = earlier.map(|start| self.route_from(start, FURTHER, true));
                let initial = whole(Start::Initial, 1, true);
                let affordable = |r: &Route| r.first <= step_of(&r.start) + 1 + APPROACH;
                let mut all = vec![near];
                for route in further.into_iter().filter(affordable).chain([initial]) {
                    if all.iter().all(|known| known.first > route.first) {
                        all.push(route);
                    }
                }
                all
            }
        }
    }

    fn route_from(&self, start: &Start, lead: u64, back: bool) -> Route {
        let (from, at) = (step_of(start), self.lead(lead));
        let after = (at > from).then_some(at);
        Route { start: start.clone(), after, first: after.unwrap_or(from) + 1, back }
    }

    /// A kept state so many steps before the spike, or up to three more.
    fn lead(&self, steps: u64) -> u64 {
        self.onset.saturating_sub(steps) / KEPT * KEPT
    }

    /// The nearest start point before `step` from which the optimizer's state is known.
    fn whole_before(&self, step: u64) -> Start {
        let known = |s: &&Start| match s {
            Start::Initial => true,
            Start::Checkpoint(k) => {
                let mut checkpoints = self.subject.run.checkpoints.iter();
                checkpoints.any(|c| c.step == *k && c.has_optimizer && c.has_scheduler && c.step < step)
            }
        };
        self.subject.starts_before(step).iter().find(known).cloned().unwrap_or(Start::Initial)
    }

    /// Steps that a trial will replay under its change, as far as it can be told before.
    pub(super) fn cost(&self, proposal: &Proposal, route: &Route) -> u64 {
        let first = self.first_with_rows(proposal).unwrap_or(route.first).max(route.first);
        (self.to + 1).saturating_sub(first)
    }

    /// The first step whose window holds one of the rows that the proposal neutralises.
    fn first_with_rows(&self, proposal: &Proposal) -> Option<u64> {
        let rows = proposal.interventions.iter().find_map(|i| match i {
            crate::replay::Intervention::NeutraliseRows(rows) => Some(rows),
            _ => None,
        })?;
        let holds = |r: &&crate::replay::StepRecord| {
            r.micro_batches.iter().any(|m| m.rows.iter().any(|row| rows.contains(row)))
        };
        self.out.baseline.iter().find(holds).map(|r| r.step)
    }

    /// Steps of a trial that the unchanged run had not replayed already: all from the first that differs.
    pub(super) fn own_windows(&self, route: &Route, trace: &Trace) -> u64 {
        let shared = if route.start == self.near {
            trace.steps.iter().zip(&self.out.baseline).take_while(|(own, base)| own == base).count()
        } else {
            trace.steps.iter().take_while(|r| r.step < route.first).count()
        };
        (trace.steps.len() - shared) as u64
    }
}
