//! The CPU device: half tensors are f32 buffers that hold rounded values.

mod mapped;

/// A range of bytes of a memory-mapped file; cheap to clone, keeps the map alive.
#[derive(Debug, Clone)]
pub struct MappedBytes {
    pub map: std::sync::Arc<memmap2::Mmap>,
    pub offset: usize,
    pub length: usize,
}
