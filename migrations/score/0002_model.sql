-- Which read model is in use.

-- A read model belongs to a consumer of the inbox: what the model contains is what
-- inbox.aggregate says under that name, since both are written in one transaction. A rebuild makes a
-- second model under another name (the role `shadow`) and then lets the two change places, so the
-- name of the one that is read is stored and not built in.
--   role      live: it is read, and its changes are published. shadow: it is being built.
--   consumer  its name in the inbox. A name is never used again.
-- Whoever writes to a model locks its row FOR SHARE first, in the same transaction; the exchange locks
-- it FOR UPDATE. So nobody writes to a model under the other one's name.
CREATE TABLE score.model (
    role     text        PRIMARY KEY CHECK (role IN ('live', 'shadow')),
    consumer text        NOT NULL UNIQUE,
    since    timestamptz NOT NULL DEFAULT now()
);
INSERT INTO score.model (role, consumer) VALUES ('live', 'score');

-- What each program needs and no more: the rights of before, and the model's name. A row lock needs the
-- right to update some column, so the projector has one that says nothing.
CREATE OR REPLACE FUNCTION score.grant_projector(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA score TO %s', role);
    EXECUTE format('GRANT SELECT ON score.migration, score.model TO %s', role);
    EXECUTE format('GRANT UPDATE (since) ON score.model TO %s', role);
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON score.person, score.entry TO %s', role);
END
$$;
CREATE OR REPLACE FUNCTION score.grant_api(role regrole) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('GRANT USAGE ON SCHEMA score TO %s', role);
    EXECUTE format('GRANT SELECT ON score.migration, score.model, score.person, score.entry TO %s', role);
END
$$;
