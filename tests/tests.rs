//! Table of contents of the integration tests; one file an area, names are sentences.

mod batches; // vectors: orders, splits, ids, labels, windows
mod bench; // precision bench: verdicts, PyTorch's gradient errors, planted overflow
mod cli; // the program as a user types it: exit codes, messages, files
mod cuda; // the driver's messages, GPU memory, kernel benchmarks (a GPU or the emulator)
mod device; // every operation on the CPU and on CUDA (or its emulator), against f64 and PyTorch
mod diagnosis; // verdicts on scripted evidence and on recorded runs
mod eval; // eval_loss of checkpoints against transformers
mod inspect; // log forensics, lint, eval, comparison
mod model; // forward and backward against PyTorch and candle's autograd
mod numerics; // what arithmetic is, seen from outside; faults found and told apart
mod replay; // recorded runs replayed to the numbers in their logs
mod report; // pages and terminal text on made-up results
mod run; // readers: good files, broken files, generated garbage
mod step; // clip, optimizers, schedules, loss scale
mod sweep; // grids, shards, merge
