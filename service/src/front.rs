//! What stands in front of every program's routes.

mod caller;

pub use self::caller::Caller;
