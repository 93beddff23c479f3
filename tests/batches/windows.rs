//! Shards, windows, leaks and resumes against accelerate and transformers of both generations.
