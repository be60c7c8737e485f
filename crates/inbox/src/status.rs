/// One thing that a consumer needs: there, or why it waits.
pub type Part = Result<(), String>;

/// What a consumer waits for, and what somebody should look at. A program maps it to its readiness; no
/// part carries secrets or data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The database answers.
    pub database: Part,
    /// The broker is connected, and its exchanges and queues are as they should be.
    pub broker: Part,
    /// The queue and its dead letters are subscribed to.
    pub consuming: Part,
    /// What came of the followed sources came from their users.
    pub sources: Part,
    /// What is received is applied, or nothing waits.
    pub applying: Part,
    /// Versions that are missing for long, if any. It is no reason not to go on.
    pub holes: Option<String>,
    /// Events that contradict what was applied, if any. It is no reason not to go on.
    pub forks: Option<String>,
    /// A limit of what is stored of others' messages that is reached, if any. It is no reason not to go on.
    pub limits: Option<String>,
}

impl Status {
    /// Each part that is waited for, and why; nothing when it is at work.
    pub fn waiting(&self) -> Vec<String> {
        let parts = [
            ("database", &self.database),
            ("broker", &self.broker),
            ("consuming", &self.consuming),
            ("sources", &self.sources),
            ("applying", &self.applying),
        ];
        let reason = |(name, part): (&str, &Part)| part.as_ref().err().map(|why| format!("{name}: {why}"));
        parts.into_iter().filter_map(reason).collect()
    }

    pub(crate) fn starting() -> Self {
        let starting = || Err("starting".to_owned());
        Self {
            database: starting(),
            broker: starting(),
            consuming: starting(),
            sources: Ok(()),
            applying: Ok(()),
            holes: None,
            forks: None,
            limits: None,
        }
    }
}
