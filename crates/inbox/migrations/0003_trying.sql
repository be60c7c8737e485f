-- Events whose handler may end the process.

-- A message that came back twice, or from the dead letters, may be the one that its consumers died of.
-- That it is tried is committed before its handler runs:
--   trying  `attempts` says how often. Who finds it knows that nobody came back so far; after the third
--           time it is poison. Later versions of the aggregate are `behind` it.
ALTER TABLE inbox.held DROP CONSTRAINT held_reason_check;
ALTER TABLE inbox.held
    ADD CONSTRAINT held_reason_check CHECK (reason IN ('gap', 'poison', 'behind', 'trying'));

-- For counts and alarms: suspected forks, the latest first.
CREATE INDEX rejected_reason ON inbox.rejected (consumer, reason, last_at);
