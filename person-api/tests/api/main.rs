//! The person service over real PostgreSQL, as the role with the fewest rights that it can run with.

mod answers;
mod bad_input;
mod concurrency;
mod events;
mod outage;
mod program;
mod support;
