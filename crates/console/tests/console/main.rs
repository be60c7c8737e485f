//! The console over real databases: what its pages say, who may see them, and what its actions do.

#![expect(clippy::unwrap_used, reason = "a panic is the report of a test")]

#[macro_use]
mod desk;

mod access;
mod acting;
mod browser;
mod finding;
mod following;
mod looking;
