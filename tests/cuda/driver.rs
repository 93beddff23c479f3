//! What only CUDA has. Each case runs this binary again as a child with the emulator's settings in its environment,
//! because driver and device memory belong to the process.

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use spikeprobe::device::cpu::MappedBytes;
use spikeprobe::device::{self, Compute, DType, Device, Tensor};
use spikeprobe::numerics::{DeviceProduct, Through, fingerprint, published};

use crate::device::{compare::close, download, reference::values};

/// Tests that start children of this binary go one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `child` with the settings; its standard output. `None` without the emulator.
fn child(case: &str, settings: &[(&str, &str)]) -> Option<(bool, String)> {
    if std::env::var_os("SPIKEPROBE_EMULATOR").is_none() {
        assert!(std::env::var_os("SPIKEPROBE_REQUIRE_CUDA").is_none(), "these tests need scripts/with-emulator");
        eprintln!("SKIPPED: driver messages are provoked on the emulator, scripts/with-emulator");
        return None;
    }
    let _guard = alone();
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.args(["--exact", "cuda::driver::child_of_the_tests_above", "--nocapture", "--test-threads=1"]);
    command.env("SPIKEPROBE_TEST_CHILD", case).envs(settings.iter().copied());
    let output = command.output().expect("child");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Some((output.status.success(), text))
}

/// The message of opening cuda:0 with these settings.
fn message(settings: &[(&str, &str)]) -> Option<String> {
    child("open", settings).map(|(_, text)| text)
}

#[track_caller]
fn says(settings: &[(&str, &str)], parts: &[&str]) {
    let Some(text) = message(settings) else { return };
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

#[test]
fn no_driver_is_said_with_what_to_install() {
    says(&[("LD_LIBRARY_PATH", "")], &["there is no NVIDIA driver", "525 or newer", "--device cpu"]);
}

#[test]
fn an_old_driver_is_said_with_its_version() {
    says(&[("SPIKEPROBE_EMULATOR_DRIVER", "11040")], &["too old", "CUDA 11.4", "12.0 is needed", "525"]);
}

#[test]
fn no_gpu_is_said() {
    says(&[("SPIKEPROBE_EMULATOR_DEVICES", "0")], &["finds no GPU", "nvidia-smi", "CUDA_VISIBLE_DEVICES"]);
}

#[test]
fn an_old_gpu_is_said_with_its_capability() {
    says(&[("SPIKEPROBE_EMULATOR_CAPABILITY", "61")], &["compute capability 6.1", "7.5"]);
}

#[test]
fn a_missing_cublas_is_said_with_where_it_was_looked_for() {
    let Ok(libraries) = std::env::var("LD_LIBRARY_PATH") else { return };
    let folder = tempfile::tempdir().expect("folder");
    let driver = libraries.split(':').map(|f| std::path::Path::new(f).join("libcuda.so.1")).find(|f| f.exists());
    let Some(driver) = driver else { return };
    std::fs::copy(driver, folder.path().join("libcuda.so.1")).expect("copy");
    let alone = folder.path().display().to_string();
    let settings = [
        ("LD_LIBRARY_PATH", alone.as_str()),
        ("PATH", ""),
        ("VIRTUAL_ENV", ""),
        ("CONDA_PREFIX", ""),
        ("CUDA_HOME", ""),
    ];
    says(&settings, &["no usable cuBLAS", "libcublas.so.12: not found", "PyTorch", "--device cpu"]);
}

#[test]
fn an_unknown_gpu_is_said_with_those_there_are() {
    says(&[("SPIKEPROBE_TEST_DEVICE", "cuda:3")], &["there is no cuda:3", "cuda:0"]);
    let e = device::open("gpu", None).map(|d| d.name()).expect_err("no such name");
    assert_eq!(e.exit_code(), 2, "{e}");
}

/// One step of a recorded f32 run by the program itself: (succeeded, what it says).
fn replay(device: &str, settings: &[(&str, &str)]) -> Option<(bool, String)> {
    if std::env::var_os("SPIKEPROBE_EMULATOR").is_none() {
        assert!(std::env::var_os("SPIKEPROBE_REQUIRE_CUDA").is_none(), "these tests need scripts/with-emulator");
        eprintln!("SKIPPED: needs the emulator, scripts/with-emulator");
        return None;
    }
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/runs");
    let run = format!("{root}/runs/k6-healthy-cos-qwen2-fp32");
    let mut command = Command::new(env!("CARGO_BIN_EXE_spikeprobe"));
    command.args(["replay", &run, "--root", root, "--from", "initial", "--to", "1", "--cache", "none"]);
    let output = command.args(["--device", device]).envs(settings.iter().copied()).output().expect("program");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Some((output.status.success(), text))
}

#[test]
fn auto_falls_back_to_the_cpu_and_says_why() {
    says(&[("LD_LIBRARY_PATH", ""), ("SPIKEPROBE_TEST_DEVICE", "auto")], &["opened cpu"]);
    let Some((succeeded, text)) = replay("auto", &[("SPIKEPROBE_EMULATOR_CAPABILITY", "61")]) else { return };
    assert!(succeeded && text.contains("on the CPU: ") && text.contains("compute capability 6.1"), "{text}");
    assert!(text.contains("the log is reproduced"), "{text}");
}

#[test]
fn a_pass_that_does_not_fit_runs_in_smaller_chunks() {
    // 20 MiB hold the whole window at once; cuBLAS's workspace takes 8.3 of them.
    let Some((succeeded, text)) = replay("cuda:0", &[("SPIKEPROBE_EMULATOR_MEMORY", "15728640")]) else { return };
    assert!(succeeded && text.contains("the log is reproduced"), "{text}");
    let (succeeded, text) = replay("cuda:0", &[("SPIKEPROBE_EMULATOR_MEMORY", "11534336")]).expect("emulator");
    assert!(!succeeded, "{text}");
    for part in ["one micro-batch at a time", "out of GPU memory", "of 11 MiB", "held by this replay", "--device cpu"] {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

#[test]
fn out_of_memory_is_an_error_with_the_numbers() {
    let settings = [("SPIKEPROBE_EMULATOR_MEMORY", "67108864"), ("SPIKEPROBE_TEST_DEVICE", "cuda:0")];
    let Some((_, text)) = child("exhaust", &settings) else { return };
    for part in ["out of GPU memory: 20 MiB wanted", "MiB free of 64 MiB", "held by this replay", "after dropping: ok"]
    {
        assert!(text.contains(part), "{part:?} is missing in: {text}");
    }
}

#[test]
fn weights_larger_than_the_memory_are_streamed_and_right() {
    // 12 weights of 4 MiB on a device of 40 MiB, of which 60 % are for weights; with and without the pool.
    for pool in ["on", "off"] {
        let settings = [("SPIKEPROBE_EMULATOR_MEMORY", "41943040"), ("SPIKEPROBE_CUDA_POOL", pool)];
        let Some((succeeded, text)) = child("stream", &settings) else { return };
        assert!(succeeded && text.contains("streamed: ok"), "pool {pool}: {text}");
    }
}

/// Streaming hides behind the kernels only if a weight's copy need not wait for the layers queued before it.
#[test]
fn weights_are_copied_while_earlier_kernels_wait() {
    let settings = [
        ("SPIKEPROBE_EMULATOR_MEMORY", "41943040"),
        ("SPIKEPROBE_EMULATOR_COPIES", "1"),
        ("SPIKEPROBE_TEST_LATE", "1"),
    ];
    let Some((succeeded, text)) = child("stream", &settings) else { return };
    let (ahead, all) = copies(&text).expect("a count of copies");
    // 36 products with 12 weights of which 6 fit; the first copies find nothing queued before them.
    assert!(succeeded && all >= 24 && ahead * 2 >= all, "{ahead} of {all} copies ran ahead: {text}");
}

/// Large copies to the device that ran ahead of queued kernels, and all of them, as the emulator counts them.
fn copies(text: &str) -> Option<(usize, usize)> {
    let line = text.lines().find_map(|line| line.strip_prefix("cuda emulator: "))?;
    let mut numbers = line.split(' ').filter_map(|word| word.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// The whole program with its weights streamed gives the bits it gives with all of them resident.
#[test]
fn a_replay_with_streamed_weights_is_the_same() {
    if std::env::var_os("SPIKEPROBE_EMULATOR").is_none() {
        return eprintln!("SKIPPED: needs the emulator, scripts/with-emulator");
    }
    let replayed = |memory: &str| {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("out.json");
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/runs");
        let mut command = Command::new(env!("CARGO_BIN_EXE_spikeprobe"));
        command.args(["replay", &format!("{root}/runs/i1-purebf16-llama"), "--root", root, "--to", "1"]);
        command.args(["--device", "cuda:0", "--cache", "none", "-q", "--json"]).arg(&path);
        command.env("SPIKEPROBE_EMULATOR_MEMORY", memory).env("SPIKEPROBE_EMULATOR_COPIES", "1");
        let output = command.output().expect("program");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{memory} bytes: {text}");
        let all = copies(&text).expect("a count of copies").1;
        (all, std::fs::read_to_string(path).expect("result"))
    };
    // 2 MiB of bf16 weights; of 12 MiB cuBLAS's workspace takes 8.3, and 60 % of the rest are for weights.
    let ((resident, whole), (streamed, same)) = (replayed("1073741824"), replayed("12582912"));
    assert!(streamed > 2 * resident, "{streamed} copies, {resident} with enough memory");
    assert!(whole == same, "{whole}\n{same}");
}

#[test]
fn device_memory_is_all_returned() {
    for pool in ["on", "off"] {
        let settings = [("SPIKEPROBE_EMULATOR_STRICT", "1"), ("SPIKEPROBE_CUDA_POOL", pool)];
        let Some((succeeded, text)) = child("stream", &settings) else { return };
        assert!(succeeded && !text.contains("never freed"), "pool {pool}: {text}");
    }
}

/// Does nothing unless a test above started it.
#[test]
fn child_of_the_tests_above() {
    let Ok(case) = std::env::var("SPIKEPROBE_TEST_CHILD") else { return };
    let name = std::env::var("SPIKEPROBE_TEST_DEVICE").unwrap_or_else(|_| "cuda:0".to_string());
    let device = match device::open(&name, Some(1)) {
        Ok(device) => device,
        Err(e) => return println!("{e}"),
    };
    match case.as_str() {
        "exhaust" => exhaust(&*device),
        "stream" => stream(&*device),
        "matrix unit" => matrix_unit(&*device),
        _ => println!("opened {}", device.name()),
    }
}

#[test]
fn the_matrix_unit_is_asked_where_the_card_has_it_and_its_twin_is_the_published_a100() {
    let of = |capability| child("matrix unit", &[("SPIKEPROBE_EMULATOR_CAPABILITY", capability)]);
    let (Some((_, turing)), Some((_, ampere))) = (of("75"), of("80")) else { return };
    assert!(turing.contains("no matrix unit"), "{turing}");
    for kind in ["Tf32", "Bf16", "F16"] {
        assert!(ampere.contains(&format!("{kind} as published")), "{ampere}");
    }
}

/// The fingerprint through mma.sync, or its host twin, beside the A100's profiles.
fn matrix_unit(device: &dyn Device) {
    for profile in published().iter().filter(|p| p.name.starts_with("A100")) {
        let compute = profile.arithmetic.operand;
        let product = DeviceProduct { device, compute, through: Through::MatrixUnit, tile: 16 };
        if !product.exists().expect("an answer") {
            println!("{compute:?}: no matrix unit");
            continue;
        }
        let (seen, expected) = (fingerprint(&product).expect("unit"), fingerprint(&profile.arithmetic).expect("model"));
        match seen == expected {
            true => println!("{compute:?} as published"),
            false => println!("{compute:?}: {seen:?}, published: {expected:?}"),
        }
    }
}

fn exhaust(device: &dyn Device) {
    let mut held = Vec::new();
    let error = loop {
        match device.zeros(&[5 << 20], DType::F32) {
            Ok(x) => held.push(x),
            Err(e) => break e,
        }
    };
    println!("{error}");
    held.clear();
    if device.zeros(&[5 << 20], DType::F32).is_ok() {
        println!("after dropping: ok");
    }
}

/// Products with weights that live in a mapped file at odd offsets, twice forwards and once backwards through them.
fn stream(device: &dyn Device) {
    let (count, inner, width) = (12, 1024, 1024);
    let file = tempfile::NamedTempFile::new().expect("file");
    let mut bytes = vec![0u8; 3]; // so that no weight is aligned
    let weights: Vec<Vec<f32>> = (0..count).map(|i| values(inner * width, 100 + i)).collect();
    weights.iter().flatten().for_each(|x| bytes.extend(x.to_le_bytes()));
    std::fs::write(file.path(), &bytes).expect("write");
    let map = MappedBytes::open(file.path()).expect("map");
    let mapped: Vec<Tensor> = (0..count as usize)
        .map(|i| {
            let part = map.slice(3 + i * inner * width * 4, inner * width * 4).expect("inside");
            Tensor::mapped(part, &[width, inner], DType::F32).expect("tensor")
        })
        .collect();
    let xs = values(2 * inner, 1);
    let x = device.upload(&xs, &[2, inner], DType::F32).expect("x");
    if std::env::var_os("SPIKEPROBE_TEST_LATE").is_some() {
        // Nothing asks for a result before all products are queued.
        let product = |i: usize| device.linear(&x, &mapped[i], None, Compute::F32, DType::F32).expect("linear");
        let all: Vec<Tensor> = (0..12).chain(0..12).chain((0..12).rev()).map(product).collect();
        assert!(all.iter().all(|y| download(device, y).iter().all(|y| y.is_finite())));
        return;
    }
    for i in (0..12).chain(0..12).chain((0..12).rev()) {
        let y = device.linear(&x, &mapped[i], None, Compute::F32, DType::F32).expect("linear");
        let want: Vec<f64> = (0..2 * width)
            .map(|at| {
                let (x, w) = (&xs[at / width * inner..][..inner], &weights[i][at % width * inner..][..inner]);
                x.iter().zip(w).map(|(a, b)| *a as f64 * *b as f64).sum()
            })
            .collect();
        close(&format!("weight {i}"), &download(device, &y), &want, DType::F32, |_| 0.05);
    }
    println!("streamed: ok");
}
