//! What stands in front of an API's routes: limits, keys and request ids; and what its handlers share: parameters,
//! conditional reads, problems as responses, and the document of the API.

pub mod conditional;
pub mod documentation;
pub mod front;
pub mod health;
pub mod methods;
pub mod parameters;
pub mod problem;
pub mod tag;
