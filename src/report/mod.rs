//! What people and programs read: versioned JSON, terminal, HTML.

pub mod json;
