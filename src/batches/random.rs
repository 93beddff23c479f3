//! The random number generators of the trainer's data path, bit for bit: PyTorch's CPU generator (also the
//! one behind LoRA's initial weights and dropout's masks), numpy's `default_rng` (the validation split) and numpy's
//! legacy global stream (`num_samples`). What is drawn with them, and when, is the business of the callers.
//!
//! Known answers: `randperm.json`, `val_split.json`, `numpy_legacy.json`.

/// Words of mt19937's state.
const WORDS: usize = 624;

/// mt19937 as PyTorch's CPU generator and numpy's legacy `RandomState` seed and temper it (contract 3.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mt19937 {
    state: [u32; WORDS],
    /// Word that the next number is made of; `WORDS`: the first one after a twist.
    next: usize,
}

impl Mt19937 {
    /// `torch.Generator().manual_seed(seed)`, `np.random.seed(seed)`: only the low 32 bits count.
    pub fn new(seed: u64) -> Self {
        let mut state = [0u32; WORDS];
        state[0] = seed as u32;
        for j in 1..WORDS {
            let previous = state[j - 1];
            state[j] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(j as u32);
        }
        Self { state, next: WORDS }
    }

    /// A generator that was stopped before it made a number of word `next`; `None`: there is no such state.
    pub fn resumed(state: &[u32], next: usize) -> Option<Self> {
        let state = state.try_into().ok()?;
        (next <= WORDS).then_some(Self { state, next })
    }

    /// The words and the next one: what [`Mt19937::resumed`] takes.
    pub fn parts(&self) -> (&[u32], usize) {
        (&self.state, self.next)
    }

    pub fn next_u32(&mut self) -> u32 {
        if self.next == WORDS {
            self.twist();
        }
        self.next += 1;
        temper(self.state[self.next - 1])
    }

    #[inline(always)]
    fn next_two(&mut self) -> [u32; 2] {
        match self.state.get(self.next..).and_then(<[u32]>::first_chunk) {
            Some(&[first, second]) => {
                self.next += 2;
                [temper(first), temper(second)]
            }
            None => [self.next_u32(), self.next_u32()],
        }
    }

    /// Passes over `numbers` 32-bit numbers.
    pub fn skip(&mut self, mut numbers: u64) {
        while numbers > (WORDS - self.next) as u64 {
            numbers -= (WORDS - self.next) as u64;
            self.twist();
        }
        self.next += numbers as usize;
    }

    /// `n` elements of `torch.empty(...).bernoulli_(keep)` on a CPU that is not Intel's (there MKL draws them): two
    /// numbers an element, the first the high half, 53 bits of which are a uniform double
    /// (ATen/core/DistributionsHelper.h). Sets bit `first + i` of `bits` where element i is 1.
    pub fn bernoulli(&mut self, keep: f64, n: usize, bits: &mut [u32], first: usize) {
        const DOUBLE: u64 = (1 << 53) - 1;
        // k · 2^-53 < keep, k whole.
        let end = (keep * (1u64 << 53) as f64).ceil() as u64;
        for at in first..first + n {
            let [high, low] = self.next_two().map(u64::from);
            let one = ((high << 32 | low) & DOUBLE) < end;
            bits[at / 32] |= u32::from(one) << (at % 32);
        }
    }

    fn twist(&mut self) {
        let mixed = |this: u32, following: u32| {
            let y = (this & 0x8000_0000) | (following & 0x7fff_ffff);
            (y >> 1) ^ (0x9908_b0df & (y & 1).wrapping_neg())
        };
        let state = &mut self.state;
        // Three runs in which neither index wraps, so that they are computed many at once.
        for k in 0..WORDS - 397 {
            state[k] = state[k + 397] ^ mixed(state[k], state[k + 1]);
        }
        for k in WORDS - 397..WORDS - 1 {
            state[k] = state[k + 397 - WORDS] ^ mixed(state[k], state[k + 1]);
        }
        state[WORDS - 1] = state[396] ^ mixed(state[WORDS - 1], state[0]);
        self.next = 0;
    }

    /// Uniform in `0..=max` as numpy's legacy `random_interval` draws it: masked rejection.
    fn interval(&mut self, max: u32) -> u32 {
        masked_rejection(max, || self.next_u32())
    }

    /// `np.random.permutation(n)` on the global stream: Fisher–Yates from the end.
    pub fn numpy_permutation(&mut self, n: u32) -> Vec<u32> {
        shuffled(n, |i| self.interval(i))
    }

    /// `np.random.choice(n, count)` (with replacement) on the global stream. `n` > 0.
    pub fn numpy_choice(&mut self, n: u32, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.interval(n.saturating_sub(1))).collect()
    }
}

fn temper(mut y: u32) -> u32 {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c_5680;
    y ^= (y << 15) & 0xefc6_0000;
    y ^ (y >> 18)
}

/// `torch.randperm(n, generator=torch.Generator().manual_seed(seed))`, the sampler's order of one epoch
/// (contract 3.2). Valid for n < 2³² / 20; beyond that PyTorch draws 64-bit numbers.
pub fn randperm(seed: u64, n: u32) -> Vec<u32> {
    let mut generator = Mt19937::new(seed);
    let mut order: Vec<u32> = (0..n).collect();
    for i in 0..n.saturating_sub(1) {
        let offset = generator.next_u32() % (n - i);
        order.swap(i as usize, (i + offset) as usize);
    }
    order
}

/// `np.random.default_rng(seed).permutation(n)`, the shuffle behind `train_test_split` (contract 2.3).
pub fn numpy_permutation(seed: u64, n: u32) -> Vec<u32> {
    let mut generator = Pcg64::new(seed);
    shuffled(n, |i| masked_rejection(i, || generator.next_u32()))
}

/// Fisher–Yates from the last element down, `below(i)` uniform in `0..=i`.
fn shuffled(n: u32, mut below: impl FnMut(u32) -> u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i as usize, below(i) as usize);
    }
    order
}

/// Uniform in `0..=max`: numbers are cut to the bits of `max` and redrawn while above it. No draw for 0.
fn masked_rejection(max: u32, mut draw: impl FnMut() -> u32) -> u32 {
    if max == 0 {
        return 0;
    }
    let mask = u32::MAX >> max.leading_zeros();
    loop {
        let value = draw() & mask;
        if value <= max {
            return value;
        }
    }
}

/// numpy's PCG64 (XSL-RR 128/64), seeded through `SeedSequence`.
struct Pcg64 {
    state: u128,
    increment: u128,
    /// High half of the last 64-bit number, handed out by the next 32-bit draw.
    buffered: Option<u32>,
}

impl Pcg64 {
    const MULTIPLIER: u128 = 0x2360_ED05_1FC6_5DA4_4385_DF64_9FCC_F645;

    fn new(seed: u64) -> Self {
        let words = seed_sequence(seed);
        let long = |i: usize| u128::from(words[2 * i]) | (u128::from(words[2 * i + 1]) << 32);
        let initial = (long(0) << 64) | long(1);
        let sequence = (long(2) << 64) | long(3);
        let mut generator = Self { state: 0, increment: (sequence << 1) | 1, buffered: None };
        generator.step();
        generator.state = generator.state.wrapping_add(initial);
        generator.step();
        generator
    }

    fn step(&mut self) {
        self.state = self.state.wrapping_mul(Self::MULTIPLIER).wrapping_add(self.increment);
    }

    fn next_u32(&mut self) -> u32 {
        if let Some(high) = self.buffered.take() {
            return high;
        }
        self.step();
        let high = (self.state >> 64) as u64;
        let value = (high ^ self.state as u64).rotate_right((high >> 58) as u32);
        self.buffered = Some((value >> 32) as u32);
        value as u32
    }
}

/// Eight words of `np.random.SeedSequence(seed).generate_state(8)`.
fn seed_sequence(seed: u64) -> [u32; 8] {
    fn mix(x: u32, y: u32) -> u32 {
        let r = 0xca01_f9ddu32.wrapping_mul(x).wrapping_sub(0x4973_f715u32.wrapping_mul(y));
        r ^ (r >> 16)
    }
    let mut constant = 0x43b0_d7e5u32;
    let mut hash = |mut value: u32| {
        value ^= constant;
        constant = constant.wrapping_mul(0x931e_8875);
        value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    };
    // A 64-bit seed is at most two words; the pool's other words hash a zero.
    let mut pool = [hash(seed as u32), hash((seed >> 32) as u32), hash(0), hash(0)];
    for source in 0..4 {
        for target in 0..4 {
            if source != target {
                pool[target] = mix(pool[target], hash(pool[source]));
            }
        }
    }
    let mut constant = 0x8b51_f9ddu32;
    std::array::from_fn(|k| {
        let mut value = pool[k % 4] ^ constant;
        constant = constant.wrapping_mul(0x58f3_8ded);
        value = value.wrapping_mul(constant);
        value ^ (value >> 16)
    })
}
