//! Spike detection on made-up logs and on the logs of healthy recorded runs (`fixtures/diagnosis/copy_logs.py`).

use std::path::Path;

use spikeprobe::diagnosis::SpikeKind;
use spikeprobe::diagnosis::detect::{self, Context, Found, spikes};
use spikeprobe::diagnosis::height;
use spikeprobe::run::LogRow;

fn row(step: u64, loss: f64, grad_norm: f64) -> LogRow {
    LogRow {
        attempt: 0,
        step,
        window: 1,
        epoch: None,
        loss: Some(loss),
        grad_norm: Some(grad_norm),
        learning_rate: None,
        total_steps: None,
        source: String::new(),
    }
}

fn log(losses: &[f64]) -> Vec<LogRow> {
    losses.iter().enumerate().map(|(i, &l)| row(i as u64 + 1, l, 1.0)).collect()
}

fn found(losses: &[f64]) -> Vec<Found> {
    spikes(&log(losses), &Context::default())
}

/// A memorising run: fast descent, then a plateau with one per mille of noise.
fn descent(steps: usize) -> Vec<f64> {
    let noise = |i: usize| 1.0 + 1e-3 * ((i * 7919 % 13) as f64 - 6.0);
    (0..steps).map(|i| (0.05 + 3.2 * (-(i as f64) / 4.0).exp()) * noise(i)).collect()
}

#[test]
fn a_jump_out_of_a_quiet_plateau_is_found_with_its_step_and_height() {
    let mut losses = descent(40);
    losses[30] *= 10.0;
    let found = found(&losses);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].step, found[0].until, found[0].kind), (31, 31, SpikeKind::Jump));
    assert!((found[0].height - 10f64.ln()).abs() < 0.05, "{}", found[0].height);
}

/// Logged every few steps, a bad row lies in every other line of a short log.
#[test]
fn jumps_far_beyond_alternating_rows_are_found_before_the_noise_of_a_log_is_known() {
    let steps = |losses: &[f64]| found(losses).iter().map(|f| f.step).collect::<Vec<_>>();
    assert_eq!(steps(&[2.4, 0.5, 1.6, 0.09, 1.5, 0.07, 1.2, 0.065, 1.1, 0.06]), [5, 7, 9]);
    assert!(steps(&[2.4, 0.9, 2.0, 0.6, 1.9, 0.5, 1.8, 0.5, 1.7, 0.5]).is_empty(), "lengths that alternate");
}

#[test]
fn a_rise_that_stays_is_a_divergence_to_the_end_of_the_log() {
    let mut losses = descent(24);
    losses.extend([0.4, 1.5, 3.0, 4.0, 4.2, 4.0, 3.9, 3.8, 3.7, 3.6, 3.5]);
    let found = found(&losses);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].kind, found[0].until), (SpikeKind::Divergence, 35));
    assert!(found[0].step >= 25 && found[0].step <= 26, "{}", found[0].step);
}

#[test]
fn a_doubling_at_each_epoch_boundary_is_found_each_time() {
    let mut losses = vec![0.049; 60];
    (losses[20], losses[40]) = (0.097, 0.098);
    assert_eq!(found(&losses).iter().map(|f| f.step).collect::<Vec<_>>(), [21, 41]);
}

#[test]
fn a_rise_at_every_epoch_boundary_is_found_within_a_descent_and_one_at_some_is_not() {
    let mut rows = log(&(0..27).map(|i| 0.07 + 3.3 * (-f64::from(i) / 5.0).exp()).collect::<Vec<_>>());
    for row in &mut rows {
        row.epoch = Some(row.step as f64 * 5.0 / 48.0);
    }
    for step in [10, 20] {
        rows[step - 1].loss = rows[step - 1].loss.map(|l| 1.6 * l);
    }
    let steps = |rows: &[LogRow]| spikes(rows, &Context::default()).iter().map(|f| f.step).collect::<Vec<_>>();
    assert_eq!(steps(&rows), [10, 20]);
    rows[9].loss = rows[8].loss;
    assert!(!steps(&rows).contains(&10));
}

#[test]
fn a_rise_that_stays_is_found_although_the_log_has_hardly_begun() {
    let found = found(&[3.19, 3.16, 2.84, 5.7, 11.1, 6.2, 6.7, 6.8, 4.6, 4.4]);
    assert_eq!((found.len(), found[0].kind), (1, SpikeKind::Divergence));
}

#[test]
fn a_spike_at_the_third_step_of_a_short_log_is_found() {
    assert_eq!(found(&[0.0567, 0.0567, 4.85, 5.9, 5.4])[0].step, 3);
}

#[test]
fn nan_zero_and_their_neighbours_are_told_apart() {
    let found = found(&[3.0, 2.0, f64::NAN, f64::NAN, 1.5, 0.0, 1.2]);
    let kinds: Vec<_> = found.iter().map(|f| (f.step, f.until, f.kind)).collect();
    assert_eq!(kinds, [(3, 4, SpikeKind::Nan), (6, 6, SpikeKind::MaskedNan)]);
}

#[test]
fn a_tiny_loss_that_the_log_rounds_to_zero_is_no_nan() {
    let context = Context { rounds_loss: true, ..Context::default() };
    assert!(spikes(&log(&[0.01, 0.003, 0.0008, 0.0001, 0.0, 0.0001]), &context).is_empty());
}

#[test]
fn skipped_steps_count_once_the_loss_scale_is_calibrated() {
    let mut rows = log(&descent(30));
    for step in [0, 1, 2, 15] {
        rows[step].grad_norm = Some(f64::NAN);
    }
    let context = Context { loss_scaling: true, ..Context::default() };
    let found = spikes(&rows, &context);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].step, found[0].kind, found[0].height), (16, SpikeKind::SkippedStep, 1.0));
}

#[test]
fn a_gradient_that_explodes_alone_is_its_own_kind() {
    let mut rows = log(&descent(30));
    rows[20].grad_norm = Some(500.0);
    let found = spikes(&rows, &Context::default());
    assert_eq!((found.len(), found[0].step, found[0].kind), (1, 21, SpikeKind::GradientExplosion));
}

#[test]
fn a_first_loss_far_above_a_uniform_guess_is_a_multiple() {
    let losses: Vec<f64> = descent(30).iter().map(|l| 8.0 * l).collect();
    let context = Context { vocab_size: Some(2048), accumulation: 8, ..Context::default() };
    assert_eq!(spikes(&log(&losses), &context)[0].kind, SpikeKind::Level);
    assert!(spikes(&log(&descent(30)), &context).is_empty());
}

#[test]
fn benign_shapes_are_no_spikes() {
    let staircase: Vec<f64> = (0..200).map(|i| 3.0 * 0.7f64.powi(i / 50) * (1.0 + 0.05 * f64::from(i % 3))).collect();
    let alternating: Vec<f64> = (0..100).map(|i| if i % 2 == 0 { 1.0 } else { 2.0 }).collect();
    let grouped: Vec<f64> = (0..100).map(|i| if i % 8 < 4 { 1.0 } else { 1.4 }).collect();
    let bouncing_descent = [3.1, 3.2, 2.3, 1.6, 0.9, 0.54, 1.3, 0.52, 0.99, 0.28, 0.17, 0.17, 0.18, 0.12, 0.08];
    let high_start = [8.0, 5.0, 3.0, 2.5, 2.4, 2.3, 2.35, 2.3];
    for shape in [&staircase[..], &alternating, &grouped, &bouncing_descent, &high_start, &[2.0], &[]] {
        assert!(found(shape).is_empty(), "{:?} in {:?}", found(shape), &shape[..shape.len().min(20)]);
    }
}

#[test]
fn of_two_attempts_that_logged_the_same_steps_the_later_counts() {
    let mut rows = log(&[3.0, 2.0, 1.0, 9.0]);
    rows.extend([LogRow { attempt: 1, ..row(3, 1.1, 1.0) }, LogRow { attempt: 1, ..row(4, 0.9, 1.0) }]);
    let kept: Vec<_> = detect::effective(&rows).iter().map(|r| (r.step, r.loss)).collect();
    assert_eq!(kept, [(1, Some(3.0)), (2, Some(2.0)), (3, Some(1.1)), (4, Some(0.9))]);
}

#[test]
fn fifty_thousand_rows_take_seconds_and_not_minutes() {
    let losses: Vec<f64> = (0..50_000u64).map(|i| 2.0 + 0.3 * ((i * 2_654_435_761 % 1000) as f64 / 1000.0)).collect();
    let start = std::time::Instant::now();
    assert!(found(&losses).is_empty());
    assert!(start.elapsed().as_secs_f64() < 10.0, "{:?}", start.elapsed());
}

/// A run logged every fifth step: a steep descent, then out of control. The descent is no noise.
#[test]
fn a_rise_that_undoes_a_steep_descent_is_a_divergence() {
    let losses = [2.70, 0.861, 0.162, 0.0786, 0.0733, 0.212, 1.25, 2.54, 2.89, 2.80, 1.81, 1.32, 1.26, 2.27];
    let found = found(&losses);
    assert_eq!((found.len(), found[0].kind, found[0].until), (1, SpikeKind::Divergence, 14));
    assert!((6..=7).contains(&found[0].step), "{}", found[0].step);
}

#[test]
fn a_row_that_passes_the_starting_loss_is_a_jump_however_steep_the_descent_was() {
    let found = found(&[3.0, 1.0, 0.2, 0.07, 3.5]);
    assert_eq!((found.len(), found[0].step), (1, 5));
}

/// Uniform numbers in 0..1 from a seed (xorshift), and normal ones (Box-Muller).
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
    fn factor(&mut self, deviation: f64) -> f64 {
        let radius = (-2.0 * self.uniform().max(1e-300).ln()).sqrt();
        (deviation * radius * (std::f64::consts::TAU * self.uniform()).cos()).exp()
    }
}

#[test]
fn healthy_shapes_of_any_length_and_noise_are_no_spikes() {
    for seed in 1..=60u64 {
        let mut noise = Noise(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let rows = [12, 40, 120, 600][(seed % 4) as usize];
        let deviation = [0.003, 0.02, 0.05, 0.08, 0.1][(seed % 5) as usize];
        let decay = [2.0, 5.0, 15.0, 60.0][(seed / 4 % 4) as usize];
        let mut shape = |of: &dyn Fn(f64) -> f64| -> Vec<f64> {
            (0..rows).map(|i| of(f64::from(i)) * noise.factor(deviation)).collect()
        };
        let stairs = f64::from((rows / 5).max(4));
        let shapes = [
            ("level", shape(&|_| 2.0)),
            ("exponential descent", shape(&|i| 0.05 + 3.0 * (-i / decay).exp())),
            ("power law", shape(&|i| 3.0 * (i + 1.0).powf(-0.6))),
            ("staircase", shape(&|i| 3.0 * 0.6f64.powf((i / stairs).floor()))),
            ("lengths in groups", shape(&|i| if i % 8.0 < 4.0 { 1.0 } else { 1.25 })),
            ("slow wave", shape(&|i| (0.2 * (i / decay).sin()).exp())),
            ("fast alternation", shape(&|i| if i % 2.0 < 1.0 { 1.0 } else { 1.8 })),
        ];
        for (name, losses) in &shapes {
            let found = found(losses);
            assert!(found.is_empty(), "{name}, seed {seed}, {rows} rows, deviation {deviation}: {found:?}");
        }
    }
}

#[test]
fn a_divergence_is_found_behind_every_healthy_shape() {
    for seed in 1..=60u64 {
        let mut noise = Noise(seed.wrapping_mul(0xD1B5_4A32_D192_ED03));
        let deviation = [0.003, 0.02, 0.05, 0.1, 0.15][(seed % 5) as usize];
        let decay = [1.0, 2.0, 5.0, 15.0][(seed / 4 % 4) as usize];
        let quiet = [6, 14, 40, 90][(seed % 4) as usize];
        let mut losses: Vec<f64> = (0..quiet).map(|i| 0.07 + 3.0 * (-f64::from(i) / decay).exp()).collect();
        let low = losses[losses.len() - 1];
        losses.extend([3.0, 9.0, 15.0, 25.0, 24.0, 26.0].map(|factor| factor * low));
        losses.iter_mut().for_each(|loss| *loss *= noise.factor(deviation));
        let found = found(&losses);
        let rises = found.iter().any(|f| f.step as usize > losses.len() - 6 && f.until as usize == losses.len());
        assert!(rises, "seed {seed}, {quiet} rows, deviation {deviation}: {found:?} in {losses:?}");
    }
}

fn recorded(path: &Path) -> Vec<LogRow> {
    let text = std::fs::read_to_string(path).expect("a table");
    let number = |text: &str| (!text.is_empty()).then(|| text.parse().expect("a number"));
    let line = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        LogRow {
            window: fields[1].parse().expect("a window"),
            epoch: number(fields[2]),
            loss: number(fields[3]),
            grad_norm: number(fields[4]),
            ..row(fields[0].parse().expect("a step"), 0.0, 0.0)
        }
    };
    text.lines().map(line).collect()
}

#[test]
fn the_logs_of_healthy_recorded_runs_hold_no_spike_and_a_jump_in_them_is_found() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/diagnosis/logs");
    let mut logs = 0;
    for entry in std::fs::read_dir(folder).expect("logs") {
        let path = entry.expect("an entry").path();
        let mut rows = recorded(&path);
        let context = Context { accumulation: 8, vocab_size: Some(2048), ..Context::default() };
        let loss_spikes = |rows: &[LogRow]| -> Vec<Found> {
            let all = spikes(rows, &context);
            all.into_iter().filter(|f| f.kind != SpikeKind::GradientExplosion).collect()
        };
        assert!(loss_spikes(&rows).is_empty(), "{}: {:?}", path.display(), loss_spikes(&rows));
        let at = rows.len() * 3 / 4;
        rows[at].loss = rows[at].loss.map(|loss| 12.0 * loss);
        let found = loss_spikes(&rows);
        assert!(found.iter().any(|f| f.step == rows[at].step), "{}: {found:?}", path.display());
        logs += 1;
    }
    assert_eq!(logs, 15);
}

#[test]
fn the_larger_of_two_spikes_rose_farther_or_more_sharply() {
    // A first cycle that bounces, 10 times up within two rows, and a restart that climbs 25 times in ten.
    let mut slow = descent(60);
    (slow[20], slow[21]) = (0.3, 0.5);
    let climb = [0.06, 0.09, 0.14, 0.2, 0.28, 0.4, 0.55, 0.8, 1.1, 1.3, 1.2, 1.2, 1.1];
    slow[40..53].copy_from_slice(&climb);
    let rows = log(&slow);
    let both = spikes(&rows, &Context::default());
    assert_eq!(both.len(), 2, "{both:?}");
    assert!(both[0].height > both[1].height, "the first is the sharper one: {both:?}");
    assert!(height::size(&rows, &both[1]) > height::size(&rows, &both[0]), "{both:?}");
}

/// Recorded, 8 samples a row: unstable at its peak rate, calm at the end of a cycle, and a restart at step 37.
#[rustfmt::skip]
#[allow(clippy::approx_constant)] // what was logged
const RESTARTED: [f64; 48] = [
    3.18, 3.14, 2.44, 1.80, 1.20, 0.672, 0.358, 0.517, 0.221, 0.515, 0.213, 0.866, 0.162, 0.337, 1.19, 3.47,
    1.24, 1.52, 0.683, 0.507, 0.362, 0.248, 0.170, 0.123, 0.107, 0.125, 0.164, 0.151, 0.102, 0.086, 0.080,
    0.072, 0.068, 0.068, 0.067, 0.066, 0.065, 0.258, 0.182, 0.715, 1.48, 0.450, 0.305, 0.193, 0.159, 0.167,
    0.128, 0.104,
];

/// Recorded, healthy, one sample a row: the last steps up to and past an easy one.
#[rustfmt::skip]
#[allow(clippy::approx_constant)] // what was logged
const EASY_ROW: [f64; 56] = [
    0.554, 0.536, 0.635, 0.165, 0.449, 0.142, 0.668, 0.643, 0.390, 0.365, 0.314, 0.615, 0.574, 0.495, 0.353,
    0.382, 0.451, 0.441, 0.191, 0.405, 0.392, 0.351, 0.352, 0.318, 0.313, 0.289, 0.267, 0.447, 0.225, 0.272,
    0.288, 0.416, 0.280, 0.371, 0.252, 0.249, 0.291, 0.255, 0.255, 0.197, 0.176, 0.140, 0.112, 0.432, 0.441,
    0.392, 0.064, 0.624, 0.318, 0.417, 0.286, 0.277, 0.063, 0.247, 0.495, 0.517,
];

/// Recorded, one sample a row at a rate for eight: back to where it started, by single rows no higher than others.
#[rustfmt::skip]
const BACK_UP: [f64; 120] = [
    3.64, 3.57, 2.53, 2.72, 3.01, 2.16, 1.61, 2.13, 4.73, 1.59, 0.913, 4.03, 1.01, 1.59, 2.02, 1.02, 0.909,
    1.13, 0.756, 2.45, 5.06, 1.84, 3.73, 3.28, 3.11, 0.985, 1.27, 0.617, 3.04, 3.86, 1.50, 0.925, 1.00, 0.531,
    5.02, 1.14, 1.01, 3.18, 2.46, 2.90, 1.58, 4.80, 1.74, 0.581, 0.432, 4.99, 0.490, 1.98, 4.22, 4.17, 0.959,
    0.592, 3.55, 2.52, 3.29, 3.60, 2.95, 3.78, 2.89, 2.68, 3.64, 3.02, 3.08, 1.82, 2.31, 4.67, 4.08, 2.34, 3.98,
    3.20, 3.98, 3.10, 2.20, 3.07, 3.29, 2.03, 1.41, 3.88, 2.87, 2.62, 2.06, 2.95, 2.82, 1.77, 3.60, 2.52, 2.27,
    2.74, 4.19, 3.45, 4.58, 2.77, 3.68, 3.78, 2.22, 3.38, 3.64, 1.98, 3.12, 3.74, 2.14, 4.10, 4.17, 4.99, 4.07,
    2.02, 3.79, 4.15, 4.80, 2.53, 5.16, 4.06, 4.14, 3.51, 3.93, 4.19, 3.01, 2.90, 2.57, 3.67,
];

fn found_of(losses: &[f64], samples: usize) -> Vec<(u64, SpikeKind)> {
    let context = Context { samples, ..Context::default() };
    spikes(&log(losses), &context).iter().map(|f| (f.step, f.kind)).collect()
}

#[test]
fn an_instability_that_has_died_down_does_not_hide_the_next_one() {
    assert_eq!(found_of(&RESTARTED, 8), [(38, SpikeKind::Divergence)]);
    assert!(found_of(&RESTARTED[..37], 8).is_empty());
}

#[test]
fn a_row_after_an_easy_one_is_no_spike_where_a_row_is_one_sample() {
    assert_eq!(found_of(&EASY_ROW, 8), [(48, SpikeKind::Jump)]);
    assert!(found_of(&EASY_ROW, 1).is_empty(), "{:?}", found_of(&EASY_ROW, 1));
    let mut bad = EASY_ROW;
    bad[50] = 3.5;
    assert_eq!(found_of(&bad, 1), [(51, SpikeKind::Jump)], "a bad row stands out of them all the same");
}

#[test]
fn a_loss_that_goes_back_to_its_start_among_noisy_rows_has_diverged() {
    assert!(found_of(&BACK_UP, 1).iter().any(|f| f.1 == SpikeKind::Divergence), "{:?}", found_of(&BACK_UP, 1));
}
