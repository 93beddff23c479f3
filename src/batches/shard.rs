//! Batches of an epoch and the data-parallel rank that runs each (contract 3.3, 3.5): accelerate's
//! BatchSamplerShard with even batches. Knows positions in the epoch's order only, not rows.

/// The batch structure of every epoch: it depends on counts alone, the order on the epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shards {
    rows: u32,
    batch: u32,
    world: u32,
    /// Batches each rank runs in an epoch.
    per_rank: u32,
    /// Full batches at the front that all ranks get.
    plain: u32,
    /// What fills the ranks' last round: batches `plain`, `plain + 1`, … with positions from the front.
    filled: Vec<Vec<u32>>,
}

impl Shards {
    /// `rows` in batches of `batch` over `world` ranks; both at least 1.
    pub fn new(rows: u32, batch: u32, world: u32, drop_last: bool) -> Self {
        let (batch, world) = (batch.max(1), world.max(1));
        let full = rows / batch;
        let total = if drop_last { full } else { rows.div_ceil(batch) };
        let mut shards = Self { rows, batch, world, per_rank: total, plain: total, filled: Vec::new() };
        if world == 1 {
            return shards;
        }
        shards.per_rank = if drop_last { total / world } else { total.div_ceil(world) };
        if drop_last {
            shards.plain = shards.per_rank * world;
            return shards;
        }
        shards.plain = full;
        shards.filled = shards.filling();
        shards
    }

    /// A short last batch and the missing batches of the last round are filled with positions from the start
    /// of the epoch: the first `world` batches, repeated until they are long enough, taken in turn.
    fn filling(&self) -> Vec<Vec<u32>> {
        let wanted = self.per_rank * self.world;
        let (batch, size) = (self.batch as usize, (self.world * self.batch) as usize);
        let mut front: Vec<u32> = (0..self.rows.min(self.world * self.batch)).collect();
        while !front.is_empty() && front.len() < size {
            front.extend_from_within(..);
        }
        let mut next = 0;
        (self.plain..wanted)
            .map(|index| {
                let mut positions: Vec<u32> = (index * self.batch..self.rows.max(index * self.batch)).collect();
                let missing = batch - positions.len();
                positions.extend_from_slice(&front[next..next + missing]);
                next += missing;
                positions
            })
            .collect()
    }

    /// Batches each rank runs in an epoch: the trainer's `len(dataloader)`.
    pub fn per_rank(&self) -> u32 {
        self.per_rank
    }

    pub fn world(&self) -> u32 {
        self.world
    }

    /// Positions in the epoch's order of rank `rank`'s batch number `index` (< `per_rank`).
    pub fn positions(&self, index: u32, rank: u32) -> Vec<u32> {
        let global = index * self.world + rank;
        match global.checked_sub(self.plain).and_then(|i| self.filled.get(i as usize)) {
            Some(filled) => filled.clone(),
            None => (global * self.batch..((global + 1) * self.batch).min(self.rows)).collect(),
        }
    }
}
