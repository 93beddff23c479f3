//! What people and programs read: versioned JSON, terminal, HTML.
