//! The person service over real PostgreSQL, as the role with the fewest rights that it can run with.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "in a test a panic is the report")]
#![expect(clippy::format_push_string, reason = "what tests show is put together line by line")]

mod answers;
mod bad_input;
mod by_hand;
mod concurrency;
mod documentation;
mod erasing_much;
mod erasure;
mod events;
mod full_disk;
mod hosts;
mod keys;
mod life;
mod limits;
mod log;
mod open_files;
mod outage;
mod program;
mod republish;
mod retries;
mod support;
mod tags;
