//! One task of a product: packs its columns of B, runs the tiles over the whole depth, and measures and sums what is
//! written whole while it is in the cache.

use std::ops::Range;

use super::checks::{self, Summed};
use super::finish::Finish;
use super::kernel::{Scratch, Sums, Tile};
use super::pack::{self, Layout};
use super::plan::{Plan, Term};
use super::{Buffer, PANELS};
use crate::device::checks::RUN;
use crate::device::cpu::threads::Shared;

/// Columns of B packed at a time; with a part of the depth at most half of a second-level cache.
const COLUMNS: usize = RUN;
/// Most units packed at a time, where the depth has no parts.
const UNITS: usize = 1 << 18;

/// Rows × columns of C, which starts at `start` of its slice, over the whole depth.
pub struct Task<'a> {
    pub plan: &'a Plan<'a>,
    /// All rows of A.
    pub a: &'a [u32],
    pub term: Option<&'a Term<'a>>,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    pub c: &'a Shared<'a>,
    pub start: usize,
    /// The checksums to take.
    pub summed: Option<Summed<'a>>,
}

/// Columns of B that are packed: those of a part of the depth, and those of the low-rank term.
struct Packed<'p> {
    lanes: Range<usize>,
    b: &'p [u32],
    term: &'p [u32],
}

impl Task<'_> {
    pub fn run(&self) {
        let (plan, kernel) = (self.plan, self.plan.kernel);
        let most = plan.parts().map(|part| part.len()).max().unwrap_or(0);
        let width = at_a_time(most, kernel.columns).min(self.columns.len().next_multiple_of(kernel.columns));
        let mut b = Buffer::unset(width * most);
        let mut term = Buffer::unset(width * self.term.map_or(0, Term::units));
        let layout = Layout { kernel, width: kernel.columns, order: plan.order.as_ref() };
        let b: &mut [u32] = bytemuck::cast_slice_mut(&mut b);
        let term: &mut [u32] = bytemuck::cast_slice_mut(&mut term);
        let mut scratch = Scratch::new();
        for first in self.columns.clone().step_by(width.max(1)) {
            let lanes = first..(first + width).min(self.columns.end);
            if let Some(of) = self.term {
                of.pack_columns(lanes.clone(), term);
            }
            for part in plan.parts() {
                let elements = part.start * kernel.per_unit..(part.end * kernel.per_unit).min(plan.product.k);
                let out = &mut b[..lanes.len().next_multiple_of(kernel.columns) * part.len()];
                pack::pack(plan.b, lanes.clone(), elements, &layout, out);
                if let Some(summed) = self.summed
                    && !summed.checks.by_rows()
                    && self.rows.start == 0
                {
                    let (width, at) = (kernel.columns, (first, lanes.len()));
                    let packed = checks::Packed { panels: out, width, panel: width * part.len() };
                    // SAFETY: the columns belong to the tasks of this column, of which this is the first.
                    unsafe { summed.predict(false, at, part.start, kernel.per_unit, &packed) };
                }
                self.part(part, &Packed { lanes: lanes.clone(), b: out, term }, &mut scratch);
            }
        }
    }

    /// Adds a part of the depth to the task's rows.
    fn part(&self, part: Range<usize>, packed: &Packed<'_>, scratch: &mut Scratch) {
        let (panel, lanes) = (self.plan.kernel.rows, &packed.lanes);
        for row in self.rows.clone().step_by(panel) {
            self.panel(row, &part, packed, scratch);
            if part.end < self.plan.depth {
                continue;
            }
            let end = (row + panel).min(self.rows.end);
            if let Some(summed) = &self.summed {
                let (of, first) = (self.rows.start, self.columns.start);
                let first = if summed.checks.by_rows() { lanes.start == first } else { row == of };
                // SAFETY: in its share each row or column is this task's.
                unsafe { summed.add(&self.tile(row..end, lanes.clone()), (row, lanes.start), first) };
            }
            if let Some(cells) = self.plan.product.cells
                && (end == self.rows.end || end.is_multiple_of(panel * PANELS))
            {
                cells.measure(end, lanes.clone(), |rows, columns| self.tile(rows, columns));
            }
        }
    }

    /// The same for one panel of rows, from `row` on.
    fn panel(&self, row: usize, part: &Range<usize>, packed: &Packed<'_>, scratch: &mut Scratch) {
        let (plan, kernel) = (self.plan, self.plan.kernel);
        let units = part.len();
        let a = &self.a[row * plan.depth + part.start * kernel.rows..][..units * kernel.rows];
        let rows = row..(row + kernel.rows).min(self.rows.end);
        let finishes = part.end == plan.depth && plan.finishes();
        for (panel, column) in packed.lanes.clone().step_by(kernel.columns).enumerate() {
            let columns = column..(column + kernel.columns).min(packed.lanes.end);
            let finish = Finish {
                bias: plan.product.bias.map(|bias| &bias[columns.clone()]),
                out: plan.product.out,
                then: &plan.product.then,
                term: self.term.map(|term| {
                    let (units, all) = (term.units(), bytemuck::cast_slice(&term.a));
                    let b = &packed.term[panel * kernel.columns * units..][..kernel.columns * units];
                    (term, &all[row * units..][..units * kernel.rows], b)
                }),
            };
            let b = &packed.b[panel * kernel.columns * units..][..kernel.columns * units];
            let tile = self.tile(rows.clone(), columns);
            let so_far = match &plan.order {
                Some(order) => Sums::Chains(&order.chains),
                None => Sums::Part { first: part.start == 0 },
            };
            kernel.tile((a, b), &tile, so_far, finishes.then_some(&finish), scratch);
        }
    }

    fn tile(&self, rows: Range<usize>, columns: Range<usize>) -> Tile<'_> {
        let strides = self.plan.strides;
        let at = self.start + rows.start * strides.0 + columns.start * strides.1;
        Tile { c: self.c, at, strides, rows: rows.len(), columns: columns.len() }
    }
}

/// Columns of B packed at a time, if `units` of depth are.
fn at_a_time(units: usize, panel: usize) -> usize {
    COLUMNS.min((UNITS / units.max(1)).max(panel) / panel * panel)
}
