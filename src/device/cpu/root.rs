//! √x of an f32 as torch.sqrt gives it on an AMD processor: MKL's vector root, found from outside by comparing.
//!
//! Every f32 has the bits of torch 2.15 on Zen 4, with whatever instruction set it was told to use. 17 % of them are the
//! wrong neighbour of √x. The method starts from RSQRTPS, whose last bits are each maker's own: other processors part.

/// Up to here √x is correctly rounded, as below the normal range.
const LARGE: f32 = f32::from_bits(0x7f7f_f000);

/// Roots taken at a time: their estimates are looked up one by one, all else is vectors.
pub const BLOCK: usize = 256;

/// √x, in place, of at most [`BLOCK`] values: from the processor's estimate y of 1/√x two steps, every operation rounded.
#[inline(always)]
pub fn roots(values: &mut [f32]) {
    let mut looked_up = [0; BLOCK];
    for (estimate, x) in looked_up.iter_mut().zip(&*values) {
        *estimate = ESTIMATES[(x.to_bits() >> 11) as usize % ESTIMATES.len()];
    }
    for (x, estimate) in values.iter_mut().zip(looked_up) {
        let half_exponent = (x.to_bits().wrapping_add(1 << 23) >> 1) & 0x7f80_0000;
        let y = f32::from_bits(estimate.wrapping_sub(half_exponent));
        let (s, h) = (*x * y, 0.5 * y);
        let e = 0.5 - s * h;
        let (s, h) = (s + s * e, h + h * e);
        let found = s + h * (*x - s * s);
        *x = if (f32::MIN_POSITIVE..LARGE).contains(x) { found } else { x.sqrt() };
    }
}

/// What RSQRTPS gives on Zen 4. By the last bit of x's exponent and the first 12 of its significand: the bits for x in
/// [1, 4), 64 added to the exponent.
static ESTIMATES: [u32; 8192] = {
    let mut estimates = [0; 8192];
    let mut row = 0;
    while row < FALLS.len() {
        let (mut first, coarse, fine) = FALLS[row];
        let mut column = 0;
        while column < 16 {
            let mut value = first;
            let mut cell = 0;
            while cell < 16 {
                // In [½, 1), 12 bits after the first.
                estimates[(row * 16 + column) * 16 + cell] = ((value & 0xfff) << 11) + ((126 + 64) << 23);
                value -= fine >> cell & 1;
                cell += 1;
            }
            first = first.wrapping_sub((coarse >> (4 * column) & 15) as u32 + 1);
            column += 1;
        }
        row += 1;
    }
    estimates
};

/// Sixteen rows for [2, 4) and sixteen for [1, 2), each of 16 columns of 16 cells, in 8192ths: the first cell; by how much
/// the first cells of the columns fall from one to the next, less 1 (hexadecimal digits, last first); where the cells of
/// every column of the row fall by 1 (bits, last first).
#[rustfmt::skip]
const FALLS: [(u32, u64, u32); 32] = [
    (5792, 0x9a9_aa9a_aaa9_abaa, 0x5b6d), (5619, 0x898_9998_9999_9a99, 0x36d6),
    (5461, 0x888_8888_8888_9889, 0x2b56), (5315, 0x778_7787_7878_7887, 0x5556),
    (5181, 0x676_7767_7777_7777, 0x2aaa), (5056, 0x666_6766_6766_7676, 0x4aa9),
    (4940, 0x566_5666_5666_6666, 0x254a), (4831, 0x555_6556_5565_6565, 0x294a),
    (4729, 0x455_5555_5555_5555, 0x1494), (4634, 0x545_4554_5455_5455, 0x2492),
    (4544, 0x544_4454_4544_5454, 0x2492), (4459, 0x444_4444_4444_4444, 0x2249),
    (4378, 0x434_4344_4344_4443, 0x1224), (4302, 0x334_3434_3434_4343, 0x1224),
    (4230, 0x333_4333_4334_3343, 0x2222), (4161, 0x333_3333_3433_3333, 0x2222),
    (8191, 0xdee_eeee_feef_feff, 0x7f7f), (7947, 0xcdc_dddd_dddd_dede, 0x77f7),
    (7723, 0xbcb_ccbc_cccc_ccdc, 0x5f7b), (7517, 0xaba_bbab_bbbb_bbcb, 0x5ddb),
    (7326, 0xa9a_aaaa_aaaa_abaa, 0x5b76), (7150, 0x999_99a9_99a9_a9a9, 0x6d6d),
    (6986, 0x889_8989_8998_9999, 0x5b56), (6832, 0x887_8888_8888_8988, 0x356a),
    (6689, 0x778_7787_8787_8788, 0x5555), (6553, 0x776_7777_7777_7777, 0x2aaa),
    (6426, 0x766_7676_7676_7767, 0x552a), (6306, 0x666_6666_6666_7666, 0x4aa5),
    (6192, 0x656_6566_5666_6566, 0x2a52), (6085, 0x556_5565_5656_5656, 0x494a),
    (5982, 0x555_5555_5655_5555, 0x4a52), (5885, 0x545_5545_5554_5555, 0x24a4),
];
