//! AMQP's bytes, piece by piece.

/// What is left to read.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// So many bytes; nothing is taken when there are fewer.
    pub(crate) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(taken)
    }

    /// What has its length before it, in one byte.
    pub(crate) fn short(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(*self.rest.first()?);
        self.take(1 + length).map(|taken| &taken[1..])
    }

    /// What has its length before it, in four bytes.
    pub(crate) fn long(&mut self) -> Option<&'a [u8]> {
        let length = u32::from_be_bytes(*self.rest.first_chunk()?);
        self.take(usize::try_from(length).ok()?.checked_add(4)?).map(|taken| &taken[4..])
    }
}
