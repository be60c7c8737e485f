/// One thing that a consumer needs: there, or why it waits.
pub type Part = Result<(), String>;

/// What a consumer waits for. A program maps it to its readiness; no part carries secrets or data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The database answers.
    pub database: Part,
    /// The broker is connected, and its exchanges and queues are as they should be.
    pub broker: Part,
    /// The queue and its dead letters are subscribed to.
    pub consuming: Part,
}

impl Status {
    pub(crate) fn starting() -> Self {
        let starting = || Err("starting".to_owned());
        Self { database: starting(), broker: starting(), consuming: starting() }
    }
}
