"""Operations with several backends, one function each."""
