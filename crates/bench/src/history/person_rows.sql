-- The persons and their items.
BEGIN;
TRUNCATE person.person, person.income, person.asset, person.debt, person.idempotency;
SELECT pg_temp.bare('person.person', 'person.income', 'person.asset', 'person.debt');
INSERT INTO person.person (id, cpf, name, address, date_of_birth, created_at, version)
SELECT pg_temp.person_id(person), pg_temp.cpf(person), pg_temp.name(person), pg_temp.address(person), pg_temp.born(person),
       pg_temp.created_at(person), pg_temp.versions(person)
FROM (SELECT pos, pg_temp.person_at(pos) AS person FROM generate_series(1, pg_temp.events()) pos OFFSET 0) a
WHERE pg_temp.version_at(pos, person) = 1;
CREATE FUNCTION pg_temp.items(wanted text) RETURNS TABLE (id uuid, person_id uuid, value bigint, at timestamptz)
    LANGUAGE sql AS $$
    SELECT pg_temp.item_id(pos), pg_temp.person_id(person), pg_temp.value(person, wanted), pg_temp.at(pg_temp.ms(pos))
    FROM (SELECT pos, person FROM (SELECT pos, pg_temp.person_at(pos) AS person
                                   FROM generate_series(1, pg_temp.events()) pos OFFSET 0) a
          WHERE pg_temp.kind(pg_temp.version_at(pos, person)) = wanted OFFSET 0) b
$$;
INSERT INTO person.income SELECT id, person_id, 'renting', value, at FROM pg_temp.items('income');
INSERT INTO person.asset SELECT id, person_id, 'apartment', value, at FROM pg_temp.items('asset');
INSERT INTO person.debt SELECT id, person_id, value, at FROM pg_temp.items('debt');
SELECT pg_temp.dress();
COMMIT;
-- A captured table of somebody else in the same database, with a tenth as many rows as there are persons.
CREATE TABLE public.contract (id bigint PRIMARY KEY, terms text NOT NULL);
INSERT INTO public.contract SELECT n, 'terms ' || n FROM generate_series(1, pg_temp.persons() / 10) n;
SELECT outbox.capture('public.contract', 'contract');
