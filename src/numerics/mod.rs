//! What the device's arithmetic is, and whether it repeats itself.
