//! Memory for direct I/O on files and block devices, where no pool of buffers is at hand.

/// What O_DIRECT asks of an address, on every device: a page.
const ALIGNMENT: usize = 4096;

/// Memory that direct I/O accepts.
#[derive(Debug)]
pub(crate) struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// `len` zeros.
    pub(crate) fn new(len: usize) -> Self {
        let memory = vec![0; len.saturating_add(ALIGNMENT)];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.memory.get(self.start..).and_then(|rest| rest.get(..self.len)).unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.start..).and_then(|rest| rest.get_mut(..self.len)).unwrap_or_default()
    }
}
