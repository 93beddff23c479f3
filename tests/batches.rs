//! Vectors: orders, splits, ids, labels, windows.

#[path = "batches/bad_data.rs"]
mod bad_data; // what a user can get wrong
#[path = "batches/common.rs"]
pub mod common;
#[path = "batches/orders.rs"]
mod orders; // generators, splits, lengths
#[path = "batches/properties.rs"]
mod properties; // readers, encodings, windows over generated inputs
#[path = "batches/recorded.rs"]
mod recorded; // whole runs against the rows the trainer fetched
#[path = "batches/templates.rs"]
mod templates; // template elements and encoded rows
#[path = "batches/windows.rs"]
mod windows; // shards, windows, leaks, resumes
