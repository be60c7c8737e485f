-- The live read model, a shadow that is as far as it, and what both consumers have applied.
BEGIN;
SELECT score.create_shadow();
SELECT score.keep_no_samples();
SELECT nextval('score.model_number');
INSERT INTO score.model (role, consumer, queue) VALUES ('shadow', 'score-2', 'score.rebuild-2');
TRUNCATE score.person, score.entry, inbox.aggregate;
SELECT pg_temp.bare('score.person', 'score.entry', 'score_shadow.person', 'score_shadow.entry', 'inbox.aggregate');
CREATE TEMPORARY TABLE life AS
SELECT person, pg_temp.person_id(person) AS id, pg_temp.versions(person) AS version,
       pg_temp.position_of(person, pg_temp.versions(person)) AS pos
FROM (SELECT pos, pg_temp.person_at(pos) AS person FROM generate_series(1, pg_temp.events()) pos OFFSET 0) a
WHERE pg_temp.version_at(pos, person) = 1;
ANALYZE life;
INSERT INTO score.person (id, cpf, created_at, version, total, updated_at)
SELECT id, pg_temp.cpf(person), pg_temp.created_at(person), version, pg_temp.total(person, version),
       pg_temp.at(pg_temp.ms(pos) + 30)
FROM life;
INSERT INTO score.entry (id, person_id, type, value, score, created_at)
SELECT pg_temp.item_id(pos), pg_temp.person_id(person), kind, pg_temp.value(person, kind), pg_temp.score(person, kind),
       pg_temp.at(pg_temp.ms(pos))
FROM (SELECT pos, person, pg_temp.kind(pg_temp.version_at(pos, person)) AS kind
      FROM (SELECT pos, pg_temp.person_at(pos) AS person FROM generate_series(1, pg_temp.events()) pos OFFSET 0) a OFFSET 0) b
WHERE kind <> 'person';
INSERT INTO score_shadow.person SELECT * FROM score.person;
INSERT INTO score_shadow.entry SELECT * FROM score.entry;

INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id, updated_at, recent)
SELECT 'score', 'person', 'person', id, version, pg_temp.event_id(pos), pg_temp.at(pg_temp.ms(pos) + 30),
       (SELECT string_agg(pg_temp.short(pg_temp.event_id(pg_temp.position_of(person, v))), '' ORDER BY v)
        FROM generate_series(greatest(version - 15, 1), version) v)
FROM life;
INSERT INTO inbox.aggregate (consumer, source, aggregate_type, aggregate_id, version, last_event_id, updated_at, recent)
SELECT 'score-2', source, aggregate_type, aggregate_id, version, last_event_id, updated_at, recent FROM inbox.aggregate;
INSERT INTO inbox.source (consumer, name, incarnation) VALUES ('score', 'person', 1), ('score-2', 'person', 1);
SELECT pg_temp.dress();
COMMIT;
