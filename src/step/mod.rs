//! Accumulate, unscale, clip, update, schedule, loss scale: one optimizer step from one window.
