//! The person service while its servers change their roles. Slow, and with servers of its own, so `make test-faults`
//! runs it.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

mod standby;
