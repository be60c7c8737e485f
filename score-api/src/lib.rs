//! score-api
