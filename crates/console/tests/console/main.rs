//! The console over real databases: what its pages say, who may see them, and what its actions do.

#[macro_use]
mod desk;

mod access;
mod acting;
mod browser;
mod finding;
mod following;
mod looking;
