//! What happens to a tile of a product while it is in the cache: bias, rounding, and the low-rank term of an adapted
//! linear, forward and backward. Each step rounds where the separate operation would.

use super::Matrix;
use super::kernel::{COLUMNS, Scratch, Sums, Tile};
use super::plan::Term;
use crate::device::cpu::rounding::{Round, round_slice, with_round};
use crate::device::cpu::simd::vectorised;
use crate::device::{Compute, DType};

/// What the result of a product, rounded to its `out`, is added to.
#[derive(Clone, Copy)]
pub enum Then<'a> {
    Nothing,
    /// y = round(y + round(scaling · round(term))).
    AddScaled {
        term: LowRank<'a>,
        scaling: f32,
    },
    /// dx = sum so far, then the term, then this product, each rounded to `dtype` as it is added.
    Accumulate {
        so_far: Option<&'a [f32]>,
        term: Option<LowRank<'a>>,
        dtype: DType,
    },
}

impl<'a> Then<'a> {
    pub fn term(&self) -> Option<&LowRank<'a>> {
        match self {
            Then::Nothing => None,
            Then::AddScaled { term, .. } => Some(term),
            Then::Accumulate { term, .. } => term.as_ref(),
        }
    }
}

/// A second, shallow product of the same shape as the first.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// m lanes of depth `rank`.
    pub a: Matrix<'a>,
    /// n lanes of depth `rank`.
    pub b: Matrix<'a>,
    pub rank: usize,
    pub compute: Compute,
    /// What the product is rounded to.
    pub dtype: DType,
}

/// How one tile ends.
pub struct Finish<'a> {
    /// One value per column of the tile.
    pub bias: Option<&'a [f32]>,
    pub out: DType,
    pub then: &'a Then<'a>,
    /// The term and its panels of this tile's rows and columns.
    pub term: Option<(&'a Term<'a>, &'a [u32], &'a [u32])>,
}

impl Finish<'_> {
    /// Finishes the sums in `scratch` and stores them.
    pub fn tile(&self, tile: &Tile<'_>, scratch: &mut Scratch) {
        let live = tile.rows * COLUMNS;
        if let Some(bias) = self.bias {
            for row in scratch.sums[..live].chunks_exact_mut(COLUMNS) {
                row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        }
        if let Some((term, a, b)) = self.term {
            let sums = term.order.as_ref().map_or(Sums::Part { first: true }, |order| Sums::Chains(&order.chains));
            term.kernel.sums((a, b), tile.rows, sums, &mut scratch.branch, &mut scratch.stack);
        }
        match *self.then {
            Then::AddScaled { term, scaling } if tile.strides.1 == 1 => {
                with_round!(self.out, out => with_round!(term.dtype, branch => vectorised(#[inline(always)] || {
                    for row in 0..tile.rows {
                        add_scaled(tile.row(row), row_of(&scratch.sums, row), row_of(&scratch.branch, row), scaling, (out, branch));
                    }
                })));
            }
            Then::Accumulate { so_far, term, dtype } if tile.strides.1 == 1 => {
                self.accumulate(tile, scratch, (so_far, term, dtype))
            }
            Then::Nothing if tile.strides.1 == 1 => {
                with_round!(self.out, out => vectorised(#[inline(always)] || {
                    for row in 0..tile.rows {
                        let sums = row_of(&scratch.sums, row);
                        write(tile.row(row), #[inline(always)] |i| out.apply(sums[i]));
                    }
                }));
            }
            _ => {
                round_slice(&mut scratch.sums[..live], self.out);
                tile.store(&scratch.sums);
            }
        }
    }

    fn accumulate(
        &self,
        tile: &Tile<'_>,
        scratch: &mut Scratch,
        (so_far, term, dtype): (Option<&[f32]>, Option<LowRank<'_>>, DType),
    ) {
        let out = self.out;
        let alike = term.is_none_or(|term| term.dtype == out) && (dtype == out || dtype == DType::F32);
        if !alike {
            let live = tile.rows * COLUMNS;
            for (sums, first) in [(&mut scratch.sums, Some(out)), (&mut scratch.branch, term.map(|term| term.dtype))] {
                round_slice(&mut sums[..live], first.unwrap_or(DType::F32));
                round_slice(&mut sums[..live], dtype);
            }
        }
        let run = |row: usize| Rows {
            y: tile.row(row),
            product: row_of(&scratch.sums, row),
            term: term.is_some().then(|| row_of(&scratch.branch, row)),
            before: so_far.map(|x| &x[tile.at + row * tile.strides.0..][..tile.columns]),
        };
        let rows = 0..tile.rows;
        with_round!(if alike { out } else { DType::F32 }, inner => with_round!(dtype, sum => vectorised(#[inline(always)] || {
            for row in rows {
                add_in_turn(run(row), inner, sum);
            }
        })));
    }
}

/// One row of a tile and what it is made of.
struct Rows<'a> {
    y: &'a mut [f32],
    product: &'a [f32; COLUMNS],
    term: Option<&'a [f32; COLUMNS]>,
    before: Option<&'a [f32]>,
}

/// Writes the result to a row of C by way of registers: arrays of one fixed length need no checks for overlap.
#[inline(always)]
fn write(y: &mut [f32], value: impl Fn(usize) -> f32) {
    let mut row = [0f32; COLUMNS];
    for (i, x) in row.iter_mut().enumerate() {
        *x = value(i);
    }
    match y.first_chunk_mut() {
        Some(whole) => *whole = row,
        None => write_part(y, &row),
    }
}

/// Apart, so that the compiler does not make one call of `memmove` of both.
#[cold]
#[inline(never)]
fn write_part(y: &mut [f32], row: &[f32; COLUMNS]) {
    y.copy_from_slice(&row[..y.len()]);
}

#[inline(always)]
fn add_in_turn(rows: Rows<'_>, inner: impl Round, sum: impl Round) {
    let Rows { y, product, term, before } = rows;
    let mut padded = [0f32; COLUMNS];
    let before = before.map(|before| {
        before.first_chunk().unwrap_or_else(|| {
            padded[..before.len()].copy_from_slice(before);
            &padded
        })
    });
    match (before, term) {
        (Some(b), Some(t)) => {
            write(
                y,
                #[inline(always)]
                |i| sum.apply(sum.apply(b[i] + inner.apply(t[i])) + inner.apply(product[i])),
            );
        }
        (None, Some(t)) => write(
            y,
            #[inline(always)]
            |i| sum.apply(inner.apply(t[i]) + inner.apply(product[i])),
        ),
        (Some(b), None) => write(
            y,
            #[inline(always)]
            |i| sum.apply(b[i] + inner.apply(product[i])),
        ),
        (None, None) => write(
            y,
            #[inline(always)]
            |i| inner.apply(product[i]),
        ),
    }
}

/// Row `row` of a tile's buffer.
#[inline(always)]
fn row_of(buffer: &[f32], row: usize) -> &[f32; COLUMNS] {
    let from = &buffer[row * COLUMNS..];
    from.first_chunk().unwrap_or(&[0.0; COLUMNS])
}

#[inline(always)]
fn add_scaled(
    y: &mut [f32],
    base: &[f32; COLUMNS],
    term: &[f32; COLUMNS],
    scaling: f32,
    (out, branch): (impl Round, impl Round),
) {
    write(
        y,
        #[inline(always)]
        |i| out.apply(out.apply(base[i]) + branch.apply(branch.apply(term[i]) * scaling)),
    );
}
