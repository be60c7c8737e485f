-- A program of before 0007 that still runs beside this schema stores what it rejects whole, and says nothing of how
-- long it was: then the body is as long as it is.
ALTER TABLE inbox.rejected ALTER COLUMN bytes DROP NOT NULL;
