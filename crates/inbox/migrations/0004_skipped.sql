-- Skipping a held event: by hand, with who and why.

-- Events that somebody decided not to apply. Their versions were applied in the erased form, which raises
-- the version and does nothing, so that the chain stays whole. No body: it was the event's, and is gone.
CREATE TABLE inbox.skipped (
    consumer       text        NOT NULL,
    source         text        NOT NULL,
    aggregate_type text        NOT NULL,
    aggregate_id   text        NOT NULL,
    version        bigint      NOT NULL CHECK (version >= 1),
    event_id       uuid        NOT NULL,
    type           text        NOT NULL,
    error          text,
    skipped_by     text        NOT NULL CHECK (skipped_by <> ''),
    why            text        NOT NULL CHECK (why <> ''),
    skipped_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, source, aggregate_type, aggregate_id, version)
);

-- Finds a held event by its id, and lists them page by page in the order in which they were made (UUIDv7).
CREATE INDEX held_event ON inbox.held (consumer, event_id);

-- What a consumer needs and no more: the rights of before, and to record what is skipped, for good.
CREATE OR REPLACE FUNCTION inbox.grant_consumer(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA inbox TO %s', role);
    EXECUTE format('GRANT SELECT ON inbox.migration TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON inbox.aggregate, inbox.held, inbox.rejected TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT ON inbox.skipped TO %s', role);
END
$$;
