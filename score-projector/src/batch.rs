//! A batch of events, applied in memory to the part of the read model that it touches: no I/O.

pub(crate) mod cause;
pub(crate) mod entry;
pub(crate) mod needs;
pub(crate) mod refusal;
pub(crate) mod slice;
