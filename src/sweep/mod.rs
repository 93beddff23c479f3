//! Grids of settings replayed side by side.
