//! The fingerprint against arithmetics that were planted in software, and against this machine's processor.

use spikeprobe::device::{Compute, DType, cpu::CpuDevice};
use spikeprobe::numerics::order::Found;
use spikeprobe::numerics::{
    Arithmetic, CutOff, DeviceProduct, Fingerprint, Order, Rounding, Split, Sum, Through, fingerprint, published,
};

fn of(arithmetic: &Arithmetic) -> Fingerprint {
    fingerprint(arithmetic).unwrap_or_else(|e| panic!("{arithmetic:?}: {e}"))
}

/// What the fingerprint of `planted` has to say, read off its definition.
fn check(name: &str, planted: &Arithmetic) {
    let seen = of(planted);
    let block = planted.block;
    let order = match planted.order {
        Order::Sequential => Found::Sequential { block },
        Order::Lanes { lanes } => Found::Lanes { lanes, block },
        Order::Pairwise => Found::Pairwise { block },
    };
    assert_eq!(seen.order, order, "{name}");
    assert_eq!(seen.accumulator_bits, planted.accumulator_bits, "{name}");
    assert_eq!(seen.rounding, Some(planted.rounding), "{name}");
    if let Sum::Aligned { fraction_bits } = planted.sum {
        assert_eq!((seen.kept_bits, seen.cut_off), (fraction_bits, CutOff::TowardZero), "{name}");
    } else if block == 1 {
        assert_eq!(seen.kept_bits, planted.accumulator_bits - 1, "{name}");
    }
    assert_eq!(seen.subnormal_operands, planted.subnormal_operands, "{name}");
    if planted.operand != Compute::F16 {
        assert_eq!(seen.subnormal_sums, Some(planted.subnormal_sums), "{name}");
    }
    let bits = planted.split.and_then(|split| match split.rounded {
        DType::F32 => None,
        DType::BF16 => Some(8),
        DType::F16 => Some(11),
    });
    assert_eq!(seen.reduced_bits, bits, "{name}");
    let length = planted.split.map_or(usize::MAX, |split| split.length);
    if planted.order == Order::Sequential {
        assert_eq!(
            seen.cuts,
            (1..).map_while(|p| length.checked_mul(p).filter(|&at| at < 4096)).collect::<Vec<_>>(),
            "{name}"
        );
    }
    let rules = seen.nonfinite;
    assert!(rules.infinity_times_zero_is_nan && rules.infinities_cancel_to_nan && rules.nan_propagates, "{name}");
}

#[test]
fn recovers_every_published_profile_from_its_software_model() {
    for profile in published() {
        check(profile.name, &profile.arithmetic);
    }
}

#[test]
fn recovers_planted_widths_roundings_blocks_orders_and_subnormals() {
    let aligned = |block, fraction_bits| Arithmetic {
        block,
        sum: Sum::Aligned { fraction_bits },
        rounding: Rounding::TowardZero,
        ..Arithmetic::FMA
    };
    let split = |operand, block, length, rounded| {
        let wide = if block > 1 { aligned(block, 24) } else { Arithmetic::FMA };
        Arithmetic { operand, split: Some(Split { length, rounded }), ..wide }
    };
    let planted = [
        ("f32 fused multiply-adds", Arithmetic::FMA),
        ("truncating f32 chain", Arithmetic { rounding: Rounding::TowardZero, ..Arithmetic::FMA }),
        (
            "bf16 chain that flushes subnormals",
            Arithmetic { operand: Compute::Bf16, subnormal_operands: false, subnormal_sums: false, ..Arithmetic::FMA },
        ),
        (
            "fp16 chain with an 11-bit accumulator",
            Arithmetic { operand: Compute::F16, accumulator_bits: 11, ..Arithmetic::FMA },
        ),
        ("14-bit truncating accumulator, blocks of 16", Arithmetic { accumulator_bits: 14, ..aligned(16, 13) }),
        ("blocks of 4, nearest", Arithmetic { rounding: Rounding::NearestEven, ..aligned(4, 23) }),
        ("blocks of 8, two more bits", aligned(8, 25)),
        (
            "blocks of 16 without subnormals",
            Arithmetic { operand: Compute::F16, subnormal_operands: false, ..aligned(16, 24) },
        ),
        ("8 SIMD lanes", Arithmetic { order: Order::Lanes { lanes: 8 }, ..Arithmetic::FMA }),
        ("2 lanes of blocks of 8", Arithmetic { order: Order::Lanes { lanes: 2 }, ..aligned(8, 24) }),
        ("f32 in parts of 1024", split(Compute::F32, 1, 1024, DType::F32)),
        ("bf16 in parts of 1024, summed in bf16", split(Compute::Bf16, 8, 1024, DType::BF16)),
        ("fp16 in parts of 2048, summed in fp16", split(Compute::F16, 16, 2048, DType::F16)),
        ("pairwise f32", Arithmetic { order: Order::Pairwise, ..Arithmetic::FMA }),
        ("tree over blocks of 4", Arithmetic { order: Order::Pairwise, ..aligned(4, 24) }),
    ];
    for (name, arithmetic) in planted {
        check(name, &arithmetic);
    }
}

/// What can be known of any processor of ours: f32 products are chains of fused multiply-adds to nearest.
#[test]
fn describes_the_f32_products_of_this_machine() {
    let device = CpuDevice::new(Some(1)).unwrap();
    let seen =
        fingerprint(&DeviceProduct { device: &device, compute: Compute::F32, through: Through::Library, tile: 16 })
            .unwrap();
    assert_eq!((seen.kept_bits, seen.accumulator_bits), (23, 24), "{seen:?}");
    assert_eq!((seen.rounding, seen.exact_products), (Some(Rounding::NearestEven), Some(true)), "{seen:?}");
    assert!(seen.subnormal_operands && seen.subnormal_sums == Some(true), "{seen:?}");
}

#[test]
fn a_published_block_size_changes_a_result_that_a_user_can_check() {
    // 2^-24 beside 1, sixteen times: lost by a V100 (23 bits), kept by an A100 as 2^-24 each and rounded down at the
    // end of each block of eight.
    let (mut a, ones) = (vec![2f32.powi(-24); 17], vec![1f32; 17]);
    a[0] = 1.0;
    let by = |name: &str| published().into_iter().find(|p| p.name == name).unwrap().arithmetic.dot(&a, &ones);
    assert_eq!(by("V100 fp16"), 1.0);
    assert_eq!(by("A100 fp16"), 1.0 + 7.0 * f32::EPSILON);
}
