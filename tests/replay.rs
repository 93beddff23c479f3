//! Recorded runs replayed to the numbers in their logs.
//!
//! Runs: `fixtures/runs/` (its script says what they are) and `demo/`; the known answer: `fixtures/vectors/tiny_llama`.

#[path = "replay/bad_input.rs"]
mod bad_input; // damaged, missing and unfitting files of a real run
#[path = "replay/certificate.rs"]
mod certificate; // verdicts on scripted logs
#[path = "replay/dropout.rs"]
mod dropout; // masks of a CPU trainer, recorded
#[path = "replay/known_answer.rs"]
mod known_answer; // tiny_llama: four steps, every number
#[path = "replay/runs.rs"]
mod runs; // real LLaMA-Factory runs
#[path = "replay/shapes.rs"]
mod shapes; // the trainer's own shapes, and candle's second opinion
#[path = "replay/two_ranks.rs"]
mod two_ranks; // two data-parallel processes, recorded
#[path = "replay/version_logs.rs"]
mod version_logs; // tiny_llama over two epochs of both trainers, and in other precisions
