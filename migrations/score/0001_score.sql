-- The score service's read model, built from the person service's events alone.

-- One row per life of a person (a cpf that is deleted and created again has another id).
--   version        the person's version that this row contains: what a reader's token is held against.
--   total          the score: the sum of the entries. Wider than bigint, since nothing bounds their number.
--   score_version  the last version of the aggregate score/<id> that was appended to the outbox.
-- The cpf is not unique: between two aggregates there is no order, so the new life may arrive
-- before the old one's deletion. The newest life answers.
CREATE TABLE score.person (
    id            uuid          PRIMARY KEY,
    cpf           bigint        NOT NULL,
    created_at    timestamptz   NOT NULL,
    version       bigint        NOT NULL CHECK (version >= 1),
    total         numeric(28,0) NOT NULL DEFAULT 0,
    score_version bigint        NOT NULL DEFAULT 0,
    updated_at    timestamptz   NOT NULL DEFAULT now()
) WITH (fillfactor = 80);
CREATE INDEX person_cpf ON score.person (cpf, created_at DESC, id DESC);

-- How a score came about: one entry per income, asset or debt, under the item's own id.
CREATE TABLE score.entry (
    id         uuid          PRIMARY KEY,
    person_id  uuid          NOT NULL REFERENCES score.person (id) ON DELETE CASCADE,
    type       text          NOT NULL CHECK (type IN ('income', 'asset', 'debt')),
    value      numeric(19,4) NOT NULL,
    score      bigint        NOT NULL,
    created_at timestamptz   NOT NULL
);
CREATE INDEX entry_person ON score.entry (person_id, id);

-- What each program needs and no more: the projector writes, the API only reads.
CREATE FUNCTION score.grant_projector(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA score TO %s', role);
    EXECUTE format('GRANT SELECT ON score.migration TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON score.person, score.entry TO %s', role);
END
$$;
CREATE FUNCTION score.grant_api(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA score TO %s', role);
    EXECUTE format('GRANT SELECT ON score.migration, score.person, score.entry TO %s', role);
END
$$;
