//! The real binary against a real database, under a role that may only read.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a panic in a test is the report")]

mod answers;
mod documentation;
mod entries;
mod lifecycle;
mod support;
mod waiting;
