-- Telling the whole state once more.

-- How far `person-api republish --all` is: one row, of the last time that it began. It moves in the
-- transaction of each batch's baselines, so whoever goes on after a crash repeats none and leaves none out.
--   source       who published when it began (`person`, `person~2`): for another incarnation it begins anew.
--   after_id     everybody up to here was told, in the order of the ids.
--   to_id        the highest id when it began. Who is created later has told everything already.
--   total        how many persons there were then, for the progress.
--   too_large    persons who fit no event, and were left out.
CREATE TABLE person.republish (
    singleton   boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
    source      text        NOT NULL,
    after_id    uuid        NOT NULL,
    to_id       uuid        NOT NULL,
    total       bigint      NOT NULL,
    persons     bigint      NOT NULL DEFAULT 0,
    too_large   bigint      NOT NULL DEFAULT 0,
    started_at  timestamptz NOT NULL DEFAULT now(),
    started_by  text        NOT NULL,
    finished_at timestamptz
);

-- What the API, and whoever operates it, needs and no more: the rights of before, and republishing.
CREATE OR REPLACE FUNCTION person.grant_api(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA person TO %s', role);
    EXECUTE format('GRANT SELECT ON person.migration TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON person.person, person.income, person.asset, person.debt TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE ON person.republish TO %s', role);
END
$$;
