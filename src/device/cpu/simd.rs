//! Run-time choice of the instruction set: one release binary is fast on every x86-64.
//!
//! Loops are written in plain Rust and compiled three times: for AVX-512, for AVX2 + FMA, and for the target's
//! baseline. Rust never contracts a·b + c, and reductions are written with a fixed number of lanes, so the three
//! give the same bits.

use std::sync::LazyLock;

/// Instruction sets that the kernels distinguish, best last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Baseline,
    /// AVX2, FMA, POPCNT.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// The above and AVX512-BF16.
    Avx512Bf16,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Level::Baseline => "baseline",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512-bf16",
        }
    }
}

/// What this processor has; asked for once.
pub fn level() -> Level {
    static LEVEL: LazyLock<Level> = LazyLock::new(detect);
    *LEVEL
}

fn detect() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("popcnt");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx512 && is_x86_feature_detected!("avx512bf16") {
            return Level::Avx512Bf16;
        }
        if avx512 {
            return Level::Avx512;
        }
        if avx2 {
            return Level::Avx2;
        }
    }
    Level::Baseline
}

/// Runs `f` compiled for the best instruction set there is. Write `#[inline(always)]` before the closure: only what is
/// inlined here is compiled for the instruction set (else, say, each fused multiply-add calls the C library).
#[inline(always)]
pub fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    match level() {
        // SAFETY: `level` found AVX-512 F, BW, DQ, VL and what AVX2 stands for on this processor.
        Level::Avx512 | Level::Avx512Bf16 => return unsafe { with_avx512(f) },
        // SAFETY: `level` found AVX2, FMA and POPCNT on this processor.
        Level::Avx2 => return unsafe { with_avx2(f) },
        Level::Baseline => {}
    }
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")]
unsafe fn with_avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,popcnt")]
unsafe fn with_avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}
